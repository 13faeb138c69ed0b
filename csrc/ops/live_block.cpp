// Bindings of live_block and spread_block: the live rows and columns of a convolution's weight, and back.
#include "binding.h"
#include "launch.h"

namespace lp {
namespace {

struct Block {
  ConvShape shape;  // of the whole weight
  std::optional<Tensor> rows, columns;
  IndexList ins, outs;
  DType dtype;
};

Block check(const char* op, const Tensor& weight, const std::optional<Tensor>& rows, const std::optional<Tensor>& columns) {
  if (weight.dim() != 4 || (weight.scalar_type() != ScalarType::Float && weight.scalar_type() != ScalarType::Double))
    fail(op, ": weight must be float32 or float64 of shape (O, C, kh, kw); got ", dtype_name(weight.scalar_type()),
         " of shape ", show_shape(weight));
  if (weight.is_cuda()) fail(op, ": runs on the CPU; use index_select");
  Block b{};
  b.shape.outputs = weight.size(0);
  b.shape.channels = weight.size(1);
  b.shape.kh = weight.size(2);
  b.shape.kw = weight.size(3);
  b.dtype = weight.scalar_type() == ScalarType::Double ? DType::f64 : DType::f32;
  const auto list = [&](const char* name, const std::optional<Tensor>& index, int64_t size, std::optional<Tensor>& keep) {
    if (!index) return IndexList{nullptr, size};
    keep = index_argument(op, name, *index, size, Order::sorted, weight);
    return IndexList{static_cast<const int64_t*>(keep->data_ptr()), keep->size(0)};
  };
  b.outs = list("rows", rows, b.shape.outputs, b.rows);
  b.ins = list("columns", columns, b.shape.channels, b.columns);
  return b;
}

Tensor live_block(const Tensor& weight, const std::optional<Tensor>& rows, const std::optional<Tensor>& columns) {
  const Block b = check("live_block", weight, rows, columns);
  Tensor block = new_output(weight, {b.outs.count, b.ins.count, b.shape.kh, b.shape.kw});
  Scratch scratch(weight);
  live_block_cpu(b.dtype, b.shape, view_of(weight), view_of(block), b.ins, b.outs, scratch.env());
  return block;
}

void spread_block(const Tensor& block, const Tensor& out, const std::optional<Tensor>& rows,
                  const std::optional<Tensor>& columns) {
  const char* op = "spread_block";
  const Block b = check(op, out, rows, columns);
  const Sizes shape{b.outs.count, b.ins.count, b.shape.kh, b.shape.kw};
  if (show_shape(block) != show(shape) || block.scalar_type() != out.scalar_type())
    fail(op, ": block must be ", dtype_name(out.scalar_type()), " of shape ", show(shape), "; got ",
         dtype_name(block.scalar_type()), " of shape ", show_shape(block));
  if (!is_channels_last(out) && !out.is_contiguous()) fail(op, ": out must be contiguous or channels_last");
  Scratch scratch(out);
  const auto s = out.strides();
  const int64_t steps[4] = {s[0], s[1], s[2], s[3]};
  spread_block_cpu(b.dtype, b.shape, view_of(block), out.data_ptr(), steps, b.ins, b.outs, scratch.env());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lightning_prune, m) {
  m.def("live_block(Tensor weight, Tensor? rows, Tensor? columns) -> Tensor");
  m.def("spread_block(Tensor block, Tensor(a!) out, Tensor? rows, Tensor? columns) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CPU, m) {
  m.impl("live_block", TORCH_BOX(&live_block));
  m.impl("spread_block", TORCH_BOX(&spread_block));
}

}  // namespace lp
