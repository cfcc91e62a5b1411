// Which instruction sets the kernels were compiled for, and which of them run on this processor.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace corematching {

std::vector<std::string> compiled_isas();   // the newest first
std::vector<std::string> supported_isas();  // of these, the ones that run here
std::string best_isa();                     // the fastest of those

// The kernels of an instruction set; null where they were not compiled or do not run here. For amx
// it asks Linux for the tile registers.
const Kernels* find(const std::string& isa);

}  // namespace corematching
