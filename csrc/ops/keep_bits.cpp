// Binding of keep_bits: tensor &= keep, bit by bit, for a list of tensors on the CPU in one call.
#include <algorithm>

#include "binding.h"

namespace lp {
namespace {

constexpr int kMostDims = 8;

struct Dim {
  int64_t size, step, keep_step;
};

template <class T>
void keep_run(T* to, const T* keep, const Dim& d) {
  if (d.keep_step != 0) {
    for (int64_t i = 0; i < d.size; ++i) to[i * d.step] &= keep[i * d.keep_step];
  } else if (const T bits = *keep; bits == 0 && d.step == 1) {
    std::fill_n(to, d.size, T(0));
  } else if (bits != T(-1)) {
    for (int64_t i = 0; i < d.size; ++i) to[i * d.step] &= bits;
  }
}

template <class T>
void keep_all(T* to, const T* keep, const Dim* dims, int count) {
  if (count <= 1) return keep_run(to, keep, count ? *dims : Dim{1, 1, 0});
  for (int64_t i = 0; i < dims->size; ++i) keep_all(to + i * dims->step, keep + i * dims->keep_step, dims + 1, count - 1);
}

// The dimensions from the largest step to the smallest; neighbours that are one run in both tensors are one.
int merged_dims(const Tensor& t, const Tensor& keep, Dim* dims) {
  Dim all[kMostDims];
  int count = 0, merged = 0;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) all[count++] = {t.size(d), t.strides()[d], keep.size(d) == 1 ? 0 : keep.strides()[d]};
  std::stable_sort(all, all + count, [](const Dim& a, const Dim& b) { return a.step > b.step; });
  for (int i = 0; i < count; ++i) {
    Dim& last = dims[merged - 1];
    if (merged > 0 && last.step == all[i].size * all[i].step && last.keep_step == all[i].size * all[i].keep_step)
      last = {last.size * all[i].size, all[i].step, all[i].keep_step};
    else
      dims[merged++] = all[i];
  }
  return merged;
}

void keep_bits(const std::vector<Tensor>& tensors, const std::vector<Tensor>& keep) {
  const char* op = "keep_bits";
  if (tensors.size() != keep.size()) fail(op, ": got ", tensors.size(), " tensors and keep for ", keep.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor &t = tensors[i], &bits = keep[i];
    if (t.is_cuda() || bits.is_cuda()) fail(op, ": runs on the CPU; use bitwise_and_");
    bool fits = t.dim() == bits.dim() && t.dim() <= kMostDims && t.element_size() == bits.element_size();
    for (int64_t d = 0; fits && d < t.dim(); ++d) fits = bits.size(d) == 1 || bits.size(d) == t.size(d);
    if (!fits)
      fail(op, ": keep[", i, "] must broadcast against the tensor of shape ", show_shape(t), ", up to ", kMostDims,
           " dimensions, with elements of ", t.element_size(), " bytes; got shape ", show_shape(bits), " and ",
           bits.element_size());
    if (t.numel() == 0) continue;
    Dim dims[kMostDims];
    const int count = merged_dims(t, bits, dims);
    const auto run = [&](auto type) {
      using T = decltype(type);
      keep_all(static_cast<T*>(t.data_ptr()), static_cast<const T*>(bits.data_ptr()), dims, count);
    };
    switch (t.element_size()) {
      case 8:
        run(int64_t{});
        break;
      case 4:
        run(int32_t{});
        break;
      case 2:
        run(int16_t{});
        break;
      case 1:
        run(int8_t{});
        break;
      default:
        fail(op, ": elements must have 1, 2, 4 or 8 bytes; got ", t.element_size());
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lightning_prune, m) { m.def("keep_bits(Tensor(a!)[] tensors, Tensor[] keep) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CPU, m) { m.impl("keep_bits", TORCH_BOX(&keep_bits)); }

}  // namespace lp
