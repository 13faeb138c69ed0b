// Maps, random values, scratch memory and convolutions as plain loops in double, for kernels_check.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/segment.h"

using namespace lp;

namespace {

using Values = std::vector<double>;
using Index = std::vector<int64_t>;

std::mt19937 engine(7);
int checks = 0, failures = 0;

int64_t draw(int64_t from, int64_t to) { return from + int64_t(engine() % uint64_t(to - from + 1)); }
bool coin() { return engine() & 1024; }
int64_t one_of(std::initializer_list<int64_t> list) { return list.begin()[draw(0, int64_t(list.size()) - 1)]; }

Values normal(int64_t count, double scale = 1) {
  std::normal_distribution<double> of;
  Values v(static_cast<size_t>(count));
  for (double& x : v) x = scale * of(engine);
  return v;
}

// Storage of any type, one element at a time. Half types by their definition, not as the kernels do it.
size_t size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

uint16_t to_half(double v, int digits, int bias) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (v == 0) return sign;
  const int e = std::max(std::ilogb(v), 1 - bias);
  return uint16_t(sign | (((e + bias - 1) << digits) + int(std::nearbyint(std::ldexp(std::fabs(v), digits - e)))));
}
double from_half(uint16_t bits, int digits, int bias) {
  const int e = (bits & 0x7fff) >> digits, m = bits & ((1 << digits) - 1);
  if (e == 2 * bias + 1) return NAN;
  const double v = std::ldexp(e ? m + (1 << digits) : m, std::max(e, 1) - bias - digits);
  return bits & 0x8000 ? -v : v;
}

double get(DType type, const char* p) {
  float f;
  double d;
  uint16_t h;
  switch (type) {
    case DType::f64:
      return std::memcpy(&d, p, 8), d;
    case DType::f32:
      return std::memcpy(&f, p, 4), f;
    default:
      std::memcpy(&h, p, 2);
      return type == DType::bf16 ? from_half(h, 7, 127) : from_half(h, 10, 15);
  }
}
void put(DType type, char* p, double v) {
  const float f = float(v);
  const uint16_t h = type == DType::bf16 ? to_half(v, 7, 127) : to_half(v, 10, 15);
  type == DType::f64 ? std::memcpy(p, &v, 8) : type == DType::f32 ? std::memcpy(p, &f, 4) : std::memcpy(p, &h, 2);
}

// Rounded to what the type holds.
Values rounded(DType type, Values v) {
  for (double& x : v) {
    char bytes[8];
    put(type, bytes, x);
    x = get(type, bytes);
  }
  return v;
}

// Elements between two runs of NaN that nothing may write; AddressSanitizer has guards of its own, also against reading.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0, kSpare = 0;
#else
constexpr size_t kGuard = 512, kSpare = 64;
#endif
struct Memory {
  DType type;
  std::vector<char> bytes;
  Memory(DType type, size_t count) : type(type), bytes(2 * kGuard + count * size_of(type), char(0xff)) {}
  Memory(DType type, const Values& v) : Memory(type, v.size()) {
    for (size_t i = 0; i < v.size(); ++i) put(type, at(i), v[i]);
  }
  char* at(size_t i) { return bytes.data() + kGuard + i * size_of(type); }
  void* data() { return at(0); }
  bool intact() const {
    bool ok = true;
    for (size_t i = 0; i < kGuard; ++i) ok = ok && bytes[i] == char(0xff) && bytes[bytes.size() - 1 - i] == char(0xff);
    return ok;
  }
  Values values(size_t count) {
    Values v(count);
    for (size_t i = 0; i < count; ++i) v[i] = get(type, at(i));
    return v;
  }
};

enum Layout { kPlanes, kLast, kGaps };

// A map of n x c x h x w, NaN until it is filled; values are in that order whatever the layout.
struct Map {
  int64_t n, c, h, w;
  Memory memory;
  View view;
  Map(DType type, Layout layout, int64_t n, int64_t c, int64_t h, int64_t w)
      : n(n), c(c), h(h), w(w), memory(type, size_t(n * c * h * w * (layout == kGaps ? 2 : 1))) {
    view = layout == kLast   ? View{memory.data(), c * h * w, 1, w * c, c}
           : layout == kGaps ? View{memory.data(), 2 * c * h * w, 2 * h * w, 2 * w, 2}
                             : View{memory.data(), c * h * w, h * w, w, 1};
  }
  char* at(int64_t i) {
    const int64_t place = i / (c * h * w) * view.n + i / (h * w) % c * view.c + i / w % h * view.h + i % w * view.w;
    return memory.at(size_t(place));
  }
  Map& fill(const Values& v) {
    for (size_t i = 0; i < v.size(); ++i) put(memory.type, at(int64_t(i)), v[i]);
    return *this;
  }
  Values values() {
    Values v(size_t(n * c * h * w));
    for (size_t i = 0; i < v.size(); ++i) v[i] = get(memory.type, at(int64_t(i)));
    return v;
  }
};

// Of some channels only, and back among `all`, zeros elsewhere.
Values picked(const Values& v, int64_t n, int64_t all, int64_t pixels, const Index& channels) {
  Values found;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c : channels)
      for (int64_t p = 0; p < pixels; ++p) found.push_back(v[size_t((i * all + c) * pixels + p)]);
  return found;
}

double tolerance(DType type) {
  return type == DType::f64 ? 1e-11 : type == DType::f32 ? 2e-5 : type == DType::bf16 ? 2e-2 : 2e-3;
}

void expect(const std::string& what, DType type, const Values& found, const Values& wanted, double scale = 1) {
  double most = 0, largest = scale;
  bool same = found.size() == wanted.size();
  for (size_t i = 0; same && i < found.size(); ++i) {
    same = std::isfinite(found[i]);
    most = std::max(most, std::fabs(found[i] - wanted[i]));
    largest = std::max(largest, std::fabs(wanted[i]));
  }
  ++checks;
  if (same && most <= tolerance(type) * largest) return;
  ++failures;
  std::printf("WRONG: %s: error %g of %g%s\n", what.c_str(), most, largest, same ? "" : ", or not finite");
}
void expect(const std::string& what, bool ok) {
  ++checks;
  failures += !ok;
  if (!ok) std::printf("WRONG: %s\n", what.c_str());
}

// Two threads, and scratch memory full of NaN.
using Blocks = std::vector<std::unique_ptr<char, decltype(&std::free)>>;
Env env_of(Blocks& blocks, int threads = 2) {
  const auto parallel = [](int64_t n, void (*body)(int64_t, int64_t, void*), void* ctx) {
    std::thread other([&] {
      if (n > 1) body(0, n / 2, ctx);
    });
    if (n > 0) body(n / 2, n, ctx);
    other.join();
  };
  const auto alloc = [](void* owner, size_t bytes) -> void* {
    const size_t size = bytes + kSpare;
    void* block = nullptr;
    if (posix_memalign(&block, 64, size) != 0) std::abort();
    static_cast<Blocks*>(owner)->emplace_back(static_cast<char*>(block), &std::free);
    return std::memset(block, 0xff, size);
  };
  return Env{threads, parallel, alloc, &blocks};
}

double activation(Act act, double v) {
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  switch (act) {
    case Act::relu:
      return std::max(v, 0.0);
    case Act::relu6:
      return std::min(std::max(v, 0.0), 6.0);
    case Act::silu:
      return v * sigmoid(v);
    case Act::hardswish:
      return v * std::min(std::max(v + 3, 0.0), 6.0) / 6;
    case Act::gelu:
      return 0.5 * v * std::erfc(-v * std::sqrt(0.5));
    case Act::sigmoid:
      return sigmoid(v);
    default:
      return v;
  }
}
// By the value before the activation, away from kinks.
double slope(Act act, double v) {
  const double s = activation(Act::sigmoid, v);
  switch (act) {
    case Act::relu:
      return v > 0;
    case Act::relu6:
      return v > 0 && v < 6;
    case Act::silu:
      return s * (1 + v * (1 - s));
    case Act::hardswish:
      return v < -3 ? 0 : v > 3 ? 1 : v / 3 + 0.5;
    case Act::gelu:
      return 0.5 * std::erfc(-v * std::sqrt(0.5)) + v * std::exp(-v * v / 2) / std::sqrt(2 * std::acos(-1.0));
    case Act::sigmoid:
      return s * (1 - s);
    default:
      return 1;
  }
}
bool near_kink(Act act, double v) {
  const auto near = [&](double kink) { return std::fabs(v - kink) < 1e-2; };
  return act == Act::relu ? near(0) : act == Act::relu6 ? near(0) || near(6) : act == Act::hardswish && (near(3) || near(-3));
}
bool saves_output(Act act) { return act == Act::relu || act == Act::relu6 || act == Act::sigmoid; }

ConvShape conv_shape(int64_t n, int64_t c, int64_t h, int64_t w, int64_t o, int64_t kh, int64_t kw, int64_t stride, int64_t pad,
                     int64_t dil = 1, int64_t groups = 1) {
  ConvShape s{n, c, h, w, o, kh, kw, 0, 0, stride, stride, pad, pad, dil, dil, groups};
  s.out_h = (h + 2 * pad - dil * (kh - 1) - 1) / stride + 1;
  s.out_w = (w + 2 * pad - dil * (kw - 1) - 1) / stride + 1;
  return s;
}
std::string name_of(const char* what, const ConvShape& s, DType type, Act act) {
  char text[200];
  std::snprintf(text, sizeof(text), "%s n%d c%d %dx%d o%d k%dx%d stride %d pad %d dil %d groups %d type %d act %d", what,
                int(s.n), int(s.channels), int(s.height), int(s.width), int(s.outputs), int(s.kh), int(s.kw), int(s.stride_h),
                int(s.pad_h), int(s.dil_h), int(s.groups), int(type), int(act));
  return text;
}
int64_t x_count(const ConvShape& s) { return s.n * s.channels * s.height * s.width; }
int64_t y_count(const ConvShape& s) { return s.n * s.outputs * s.out_h * s.out_w; }
int64_t w_count(const ConvShape& s) { return s.outputs * (s.channels / s.groups) * s.kh * s.kw; }

// f(index in x, index in the weight, index in y) for every product of a convolution.
template <class F>
void each_product(const ConvShape& s, const F& f) {
  const int64_t ins = s.channels / s.groups, outs = s.outputs / s.groups;
  for (int64_t y = 0; y < y_count(s); ++y) {
    const int64_t n = y / (s.outputs * s.out_h * s.out_w), o = y / (s.out_h * s.out_w) % s.outputs;
    for (int64_t c = 0; c < ins; ++c)
      for (int64_t t = 0; t < s.kh * s.kw; ++t) {
        const int64_t h = y / s.out_w % s.out_h * s.stride_h - s.pad_h + t / s.kw * s.dil_h;
        const int64_t w = y % s.out_w * s.stride_w - s.pad_w + t % s.kw * s.dil_w;
        if (h < 0 || w < 0 || h >= s.height || w >= s.width) continue;
        f(((n * s.channels + o / outs * ins + c) * s.height + h) * s.width + w, (o * ins + c) * s.kh * s.kw + t, y);
      }
  }
}
Values convolved(const ConvShape& s, const Values& x, const Values& weight) {
  Values y(size_t(y_count(s)), 0.0);
  each_product(s, [&](int64_t i, int64_t w, int64_t o) { y[size_t(o)] += x[size_t(i)] * weight[size_t(w)]; });
  return y;
}

}  // namespace
