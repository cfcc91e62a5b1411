/* Everything that depends on the dtype of the weights, in the order in which it is needed. */
#include "rows.inl.h"
#include "attention.inl.h"
#include "ffn.inl.h"
#include "step.inl.h"
#include "entry.inl.h"
#include "sums.inl.h"
#include "prompt.inl.h"
#include "panels.inl.h"

#undef W
#undef F
#undef LOAD
#undef STORE
#undef WIDEN
#undef NARROW
