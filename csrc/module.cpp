// The Python module corematching.backends.cpu._kernels.
#include "bind.h"
#include "dispatch.h"
#include "large_pages.h"

namespace corematching {
namespace {

// Layers of a decode step, which stay where they are.
struct DecoderLayers {
  std::vector<DecoderLayer> items;

  DecoderLayer& at(std::size_t index) {
    if (index >= items.size()) throw nb::index_error("there is no such layer");
    return items[index];
  }
};

void bind_decode(nb::module_& m) {
  Struct<Ffn>(m, "Ffn")
      .field("up", &Ffn::up)
      .field("gate", &Ffn::gate)
      .field("up_bias", &Ffn::up_bias)
      .field("gate_bias", &Ffn::gate_bias)
      .field("down", &Ffn::down)
      .field("bias", &Ffn::bias)
      .field("neurons", &Ffn::neurons)
      .field("members", &Ffn::members)
      .field("input_threshold", &Ffn::input_threshold)
      .field("gate_threshold", &Ffn::gate_threshold)
      .field("output_threshold", &Ffn::output_threshold)
      .field("rows_read", &Ffn::rows_read)
      .field("width", &Ffn::width)
      .field("count", &Ffn::count)
      .field("biases", &Ffn::biases)
      .field("by_neuron", &Ffn::by_neuron)
      .field("activation", &Ffn::activation);
  Struct<FfnCall>(m, "FfnCall")
      .refers("ffn", &FfnCall::ffn)
      .field("x", &FfnCall::x)
      .field("out", &FfnCall::out)
      .field("scratch", &FfnCall::scratch)
      .field("batch", &FfnCall::batch)
      .field("hidden", &FfnCall::hidden)
      .field("threads", &FfnCall::threads)
      .field("dtype", &FfnCall::dtype);
  Struct<LinearCall>(m, "LinearCall")
      .field("weight", &LinearCall::weight)
      .field("bias", &LinearCall::bias)
      .field("x", &LinearCall::x)
      .field("out", &LinearCall::out)
      .field("scratch", &LinearCall::scratch)
      .field("batch", &LinearCall::batch)
      .field("inputs", &LinearCall::inputs)
      .field("outputs", &LinearCall::outputs)
      .field("threads", &LinearCall::threads)
      .field("dtype", &LinearCall::dtype);
  Struct<DecoderLayer>(m, "DecoderLayer")
      .field("attention_norm", &DecoderLayer::attention_norm)
      .field("ffn_norm", &DecoderLayer::ffn_norm)
      .field("q", &DecoderLayer::q)
      .field("k", &DecoderLayer::k)
      .field("v", &DecoderLayer::v)
      .field("o", &DecoderLayer::o)
      .field("q_bias", &DecoderLayer::q_bias)
      .field("k_bias", &DecoderLayer::k_bias)
      .field("v_bias", &DecoderLayer::v_bias)
      .field("o_bias", &DecoderLayer::o_bias)
      .field("q_norm", &DecoderLayer::q_norm)
      .field("k_norm", &DecoderLayer::k_norm)
      .field("keys", &DecoderLayer::keys)
      .field("values", &DecoderLayer::values)
      .nested("ffn", &DecoderLayer::ffn);
}

void bind_decode_step(nb::module_& m) {
  nb::class_<DecoderLayers>(m, "DecoderLayers")
      .def("__init__",
           [](DecoderLayers* self, std::size_t count) {
             new (self) DecoderLayers{std::vector<DecoderLayer>(count)};
           })
      .def("__len__", [](const DecoderLayers& self) { return self.items.size(); })
      .def("__getitem__", &DecoderLayers::at, nb::rv_policy::reference_internal);
  Struct<DecodeStep> step(m, "DecodeStep");
  step.field("final_norm", &DecodeStep::final_norm)
      .field("x", &DecodeStep::x)
      .field("out", &DecodeStep::out)
      .field("cos", &DecodeStep::cos)
      .field("sin", &DecodeStep::sin)
      .field("lengths", &DecodeStep::lengths)
      .field("valid", &DecodeStep::valid)
      .field("log_counts", &DecodeStep::log_counts)
      .field("scratch", &DecodeStep::scratch)
      .field("num_layers", &DecodeStep::num_layers)
      .field("hidden", &DecodeStep::hidden)
      .field("heads", &DecodeStep::heads)
      .field("kv_heads", &DecodeStep::kv_heads)
      .field("head_dim", &DecodeStep::head_dim)
      .field("batch", &DecodeStep::batch)
      .field("capacity", &DecodeStep::capacity)
      .field("valid_stride", &DecodeStep::valid_stride)
      .field("counted", &DecodeStep::counted)
      .field("threads", &DecodeStep::threads)
      .field("epsilon", &DecodeStep::epsilon)
      .field("scaling", &DecodeStep::scaling)
      .field("dtype", &DecodeStep::dtype);
  step.type().def(
      "set_layers",
      [](DecodeStep& self, const DecoderLayers& layers) {
        self.layers = layers.items.data();
        self.num_layers = static_cast<int64_t>(layers.items.size());
      },
      nb::keep_alive<1, 2>());
}

void bind_gemm(nb::module_& m) {
  Struct<Gemm>(m, "Gemm")
      .field("x", &Gemm::x)
      .field("weight", &Gemm::weight)
      .field("gate", &Gemm::gate)
      .field("bias", &Gemm::bias)
      .field("gate_bias", &Gemm::gate_bias)
      .field("residual", &Gemm::residual)
      .field("norm", &Gemm::norm)
      .field("norm_bias", &Gemm::norm_bias)
      .field("out", &Gemm::out)
      .field("gate_slots", &Gemm::gate_slots)
      .field("kept_gates", &Gemm::kept_gates)
      .field("scratch", &Gemm::scratch)
      .field("rows", &Gemm::rows)
      .field("inputs", &Gemm::inputs)
      .field("outputs", &Gemm::outputs)
      .field("out_stride", &Gemm::out_stride)
      .field("threads", &Gemm::threads)
      .field("epsilon", &Gemm::epsilon)
      .field("by_input", &Gemm::by_input)
      .field("activation", &Gemm::activation)
      .field("dtype", &Gemm::dtype);
  Struct<Attention>(m, "Attention")
      .field("query", &Attention::query)
      .field("key", &Attention::key)
      .field("value", &Attention::value)
      .field("mask", &Attention::mask)
      .field("out", &Attention::out)
      .field("scratch", &Attention::scratch)
      .field("query_strides", &Attention::query_strides)
      .field("key_strides", &Attention::key_strides)
      .field("value_strides", &Attention::value_strides)
      .field("mask_strides", &Attention::mask_strides)
      .field("batch", &Attention::batch)
      .field("heads", &Attention::heads)
      .field("kv_heads", &Attention::kv_heads)
      .field("length", &Attention::length)
      .field("keys", &Attention::keys)
      .field("head_dim", &Attention::head_dim)
      .field("threads", &Attention::threads)
      .field("scaling", &Attention::scaling)
      .field("causal", &Attention::causal)
      .field("mask_kind", &Attention::mask_kind)
      .field("dtype", &Attention::dtype);
}

void bind_prefill(nb::module_& m) {
  Struct<PrefillLayer>(m, "PrefillLayer")
      .field("q", &PrefillLayer::q)
      .field("k", &PrefillLayer::k)
      .field("v", &PrefillLayer::v)
      .field("o", &PrefillLayer::o)
      .field("gate", &PrefillLayer::gate)
      .field("up", &PrefillLayer::up)
      .field("down", &PrefillLayer::down)
      .field("q_bias", &PrefillLayer::q_bias)
      .field("k_bias", &PrefillLayer::k_bias)
      .field("v_bias", &PrefillLayer::v_bias)
      .field("o_bias", &PrefillLayer::o_bias)
      .field("gate_bias", &PrefillLayer::gate_bias)
      .field("up_bias", &PrefillLayer::up_bias)
      .field("down_bias", &PrefillLayer::down_bias)
      .field("attention_norm", &PrefillLayer::attention_norm)
      .field("attention_norm_bias", &PrefillLayer::attention_norm_bias)
      .field("ffn_norm", &PrefillLayer::ffn_norm)
      .field("ffn_norm_bias", &PrefillLayer::ffn_norm_bias)
      .field("hidden", &PrefillLayer::hidden)
      .field("heads", &PrefillLayer::heads)
      .field("kv_heads", &PrefillLayer::kv_heads)
      .field("head_dim", &PrefillLayer::head_dim)
      .field("width", &PrefillLayer::width)
      .field("attention_epsilon", &PrefillLayer::attention_epsilon)
      .field("ffn_epsilon", &PrefillLayer::ffn_epsilon)
      .field("scaling", &PrefillLayer::scaling)
      .field("down_by_input", &PrefillLayer::down_by_input)
      .field("activation", &PrefillLayer::activation)
      .field("dtype", &PrefillLayer::dtype);
  Struct<Prefill>(m, "Prefill")
      .field("x", &Prefill::x)
      .field("cos", &Prefill::cos)
      .field("sin", &Prefill::sin)
      .field("mask", &Prefill::mask)
      .field("qkv", &Prefill::qkv)
      .field("keys", &Prefill::keys)
      .field("values", &Prefill::values)
      .field("middle", &Prefill::middle)
      .field("out", &Prefill::out)
      .field("active", &Prefill::active)
      .field("gate_slots", &Prefill::gate_slots)
      .field("kept_gates", &Prefill::kept_gates)
      .field("scratch", &Prefill::scratch)
      .field("mask_strides", &Prefill::mask_strides)
      .field("batch", &Prefill::batch)
      .field("length", &Prefill::length)
      .field("rope_rows", &Prefill::rope_rows)
      .field("threads", &Prefill::threads)
      .field("causal", &Prefill::causal)
      .field("mask_kind", &Prefill::mask_kind);
}

void bind_rows(nb::module_& m) {
  Struct<Normalize>(m, "Normalize")
      .field("x", &Normalize::x)
      .field("norm", &Normalize::norm)
      .field("norm_bias", &Normalize::norm_bias)
      .field("out", &Normalize::out)
      .field("rows", &Normalize::rows)
      .field("width", &Normalize::width)
      .field("threads", &Normalize::threads)
      .field("epsilon", &Normalize::epsilon)
      .field("dtype", &Normalize::dtype);
  Struct<Rope>(m, "Rope")
      .field("x", &Rope::x)
      .field("keys", &Rope::keys)
      .field("values", &Rope::values)
      .field("cos", &Rope::cos)
      .field("sin", &Rope::sin)
      .field("batch", &Rope::batch)
      .field("length", &Rope::length)
      .field("heads", &Rope::heads)
      .field("kv_heads", &Rope::kv_heads)
      .field("head_dim", &Rope::head_dim)
      .field("rope_rows", &Rope::rope_rows)
      .field("threads", &Rope::threads)
      .field("dtype", &Rope::dtype);
  Struct<SumTokens>(m, "SumTokens")
      .field("values", &SumTokens::values)
      .field("tokens", &SumTokens::tokens)
      .field("factors", &SumTokens::factors)
      .field("out", &SumTokens::out)
      .field("batch", &SumTokens::batch)
      .field("length", &SumTokens::length)
      .field("width", &SumTokens::width)
      .field("threads", &SumTokens::threads)
      .field("what", &SumTokens::what)
      .field("dtype", &SumTokens::dtype);
}

void gemm(const Kernels& self, const std::vector<Gemm>& gemms) {
  if (gemms.empty() || gemms.size() > kMaxGemms) throw nb::value_error("pass 1 to 4 products");
  self.gemm(gemms.data(), static_cast<int>(gemms.size()));
}

void bind_kernels(nb::module_& m) {
  nb::class_<Kernels> type(m, "Kernels");
  type.def_ro("isa", &Kernels::isa);
  method(type, "decode_scratch", &Kernels::decode_scratch);
  method(type, "decode_step", &Kernels::decode_step);
  method(type, "ffn_scratch", &Kernels::ffn_scratch);
  method(type, "ffn", &Kernels::ffn);
  method(type, "linear", &Kernels::linear);
  method(type, "gemm_scratch", &Kernels::gemm_scratch);
  type.def("gemm", gemm, nb::call_guard<nb::gil_scoped_release>());
  method(type, "attention_scratch", &Kernels::attention_scratch);
  method(type, "attention", &Kernels::attention);
  method(type, "prefill_layer_scratch", &Kernels::prefill_layer_scratch);
  method(type, "prefill_layer", &Kernels::prefill_layer);
  method(type, "normalize", &Kernels::normalize);
  method(type, "rope", &Kernels::rope);
  method(type, "sum_tokens", &Kernels::sum_tokens);
  method(type, "weigh_marks", &Kernels::weigh_marks);
  method(type, "mark_largest", &Kernels::mark_largest);
  method(type, "kth_size", &Kernels::kth_size);
  method(type, "top_k", &Kernels::top_k);
  method(type, "unite", &Kernels::unite);
}

}  // namespace
}  // namespace corematching

NB_MODULE(_kernels, m) {
  using namespace corematching;
  nanobind::set_leak_warnings(false);  // the kernels in use stay until the interpreter has ended
  bind_decode(m);
  bind_decode_step(m);
  bind_gemm(m);
  bind_prefill(m);
  bind_rows(m);
  bind_kernels(m);
  m.attr("MAX_BATCH") = kMaxBatch;
  m.attr("MAX_GEMMS") = kMaxGemms;
  m.def("compiled_isas", &compiled_isas);
  m.def("supported_isas", &supported_isas);
  m.def("best_isa", &best_isa);
  m.def("find", &find, nb::rv_policy::reference);
  m.def("use_large_pages", &use_large_pages, nb::call_guard<nb::gil_scoped_release>());
}
