// The CPU kernels, without torch, against plain loops in double: for CPUs that the building machine can only emulate. Prints
// what is wrong and how many checks there were; the exit status says whether all passed.
#include "plain_loops.h"

namespace {

Act any_act() { return Act(draw(0, 6)); }
Index some_of(int64_t count) {
  Index found;
  for (int64_t i = 0; i < count; ++i)
    if (draw(0, 2) > 0) found.push_back(i);
  return found;
}
Index all_of(int64_t count) {
  Index found(static_cast<size_t>(count));
  std::iota(found.begin(), found.end(), 0);
  return found;
}
IndexList list_of(const Index& l, int64_t all) {
  return IndexList{int64_t(l.size()) == all ? nullptr : l.data(), int64_t(l.size())};
}

// The direct layout, then the transform of this tile.
Memory packed_weight(const ConvShape& s, DType type, int tile, Memory& weight, const Env& env) {
  const int64_t ins = s.channels / s.groups, direct = packed_size(s.outputs, ins, s.kh * s.kw, s.groups);
  Memory packed(type, size_t(direct + transformed_size(s.outputs, s.channels, s.kh, tile)));
  const View view{weight.data(), ins * s.kh * s.kw, s.kh * s.kw, s.kw, 1};
  pack_cpu(view, type, s.outputs, ins, s.kh, s.kw, s.groups, packed.data(), env);
  float* const behind = static_cast<float*>(packed.data()) + direct;
  if (tile == kStrassenTile)
    pack_strassen_cpu(view, s.outputs, s.channels, behind, env);
  else if (tile != 0)
    pack_winograd_cpu(view, s.outputs, s.channels, int(s.kh), tile, behind, env);
  return packed;
}

// `only_transform`: the direct layout becomes NaN, so that the result is that of the transform or wrong.
void check_compact(const ConvShape& s, DType type, Layout layout, int tile, bool only_transform = false) {
  const Act act = any_act();
  const DType wide = type == DType::f64 ? DType::f64 : DType::f32;
  const bool gather = !only_transform && coin(), scatter = !only_transform && coin(), residual = scatter || coin();
  const int64_t x_channels = s.channels + (gather ? 5 : 0), y_channels = s.outputs + (scatter ? 7 : 0);
  Index in = all_of(x_channels), out = all_of(y_channels);
  if (gather) std::shuffle(in.begin(), in.end(), engine);
  if (scatter) std::shuffle(out.begin(), out.end(), engine);
  in.resize(size_t(s.channels));
  out.resize(size_t(s.outputs));
  const int64_t depth = s.channels / s.groups * s.kh * s.kw, pixels = s.out_h * s.out_w;
  const Values weight = rounded(type, normal(w_count(s), 1 / std::sqrt(double(depth))));
  const Values bias = rounded(wide, normal(s.outputs)), before = rounded(type, normal(s.n * y_channels * pixels));
  const Values x = rounded(type, normal(s.n * x_channels * s.height * s.width));
  Blocks blocks;
  const Env env = env_of(blocks);
  Memory weights(wide, weight), shift(wide, bias), packed = packed_weight(s, wide, tile, weights, env);
  const size_t direct = size_t(packed_size(s.outputs, s.channels / s.groups, s.kh * s.kw, s.groups));
  const bool half_weight = wide != type && tile == 0 && coin();
  if (half_weight) packed = Memory(type, packed.values(direct));
  if (only_transform) std::memset(packed.data(), 0xff, direct * size_of(wide));
  Map from(type, layout, s.n, x_channels, s.height, s.width),
      y(type, layout == kLast ? kLast : kPlanes, s.n, y_channels, s.out_h, s.out_w);
  Map added(type, coin() ? kLast : layout, s.n, y_channels, s.out_h, s.out_w);
  from.fill(x);
  added.fill(before);
  CompactForward f{};
  f.shape = s;
  f.dtype = type;
  f.x = from.view;
  f.y = y.view;
  if (residual) f.residual = added.view;
  f.packed = packed.data();
  f.packed_is_half = half_weight;
  f.tile = tile;
  f.bias = shift.data();
  f.in_index = IndexList{gather ? in.data() : nullptr, s.channels};
  f.out_index = IndexList{scatter ? out.data() : nullptr, s.outputs};
  f.x_channels = x_channels;
  f.y_channels = y_channels;
  f.act = act;
  compact_forward_cpu(f, env);
  const Values sums = convolved(s, picked(x, s.n, x_channels, s.height * s.width, in), weight);
  Values wanted = residual ? before : Values(before.size(), 0.0);
  for (int64_t i = 0; i < y_count(s); ++i) {
    const int64_t o = i / pixels % s.outputs;
    wanted[size_t((i / (pixels * s.outputs) * y_channels + out[size_t(o)]) * pixels + i % pixels)] +=
        sums[size_t(i)] + bias[size_t(o)];
  }
  for (double& v : wanted) v = activation(act, v);
  const std::string name = name_of("compact", s, type, act) + " tile " + std::to_string(tile);
  expect(name, type, y.values(), wanted);
  expect(name + " writes outside of its map", y.memory.intact());
}

void check_masked(const ConvShape& s, DType type, Layout layout, Algorithm algorithm, bool plain = false) {
  const Act act = plain ? Act::none : any_act();
  const bool gated = !plain && coin(), in_gated = !plain && coin(), compact = !plain && coin();
  const Index live_in = plain || coin() ? all_of(s.channels) : some_of(s.channels);
  const Index live_out = plain || coin() ? all_of(s.outputs) : some_of(s.outputs);
  const int64_t ins = s.channels / s.groups, pixels = s.out_h * s.out_w, x_pixels = s.height * s.width, area = s.kh * s.kw;
  const Values x = rounded(type, normal(x_count(s))), bias = rounded(type, normal(s.outputs));
  const Values weight = rounded(type, normal(w_count(s), 1 / std::sqrt(double(ins * area))));
  const Values gate = gated ? rounded(type, normal(s.outputs)) : Values(size_t(s.outputs), 1.0);
  const Values in_gate = in_gated ? rounded(type, normal(s.channels)) : Values(size_t(s.channels), 1.0);
  Values scaled(x.size(), 0.0), y(size_t(y_count(s)), 0.0), saved = y, slopes = y;
  for (int64_t i = 0; i < s.n; ++i)
    for (int64_t c : live_in)
      for (int64_t p = 0; p < x_pixels; ++p) {
        const size_t at = size_t((i * s.channels + c) * x_pixels + p);
        scaled[at] = x[at] * in_gate[size_t(c)];
      }
  const Values sums = convolved(s, scaled, weight);
  Values grad_y = rounded(type, normal(y_count(s)));
  for (int64_t i = 0; i < s.n; ++i)
    for (int64_t o : live_out)
      for (int64_t p = 0; p < pixels; ++p) {
        const size_t at = size_t((i * s.outputs + o) * pixels + p);
        const double z = gate[size_t(o)] * (sums[at] + bias[size_t(o)]);
        y[at] = activation(act, z);
        saved[at] = saves_output(act) ? y[at] : z;
        slopes[at] = slope(act, z);
        if (near_kink(act, z)) grad_y[at] = 0;
      }
  saved = rounded(type, saved);

  Blocks blocks;
  const Env env = env_of(blocks);
  const Index map_in = compact ? live_in : all_of(s.channels), map_out = compact ? live_out : all_of(s.outputs);
  const int64_t x_channels = int64_t(map_in.size()), y_channels = int64_t(map_out.size());
  const auto of_x = [&](const Values& v) { return picked(v, s.n, s.channels, x_pixels, map_in); };
  const auto of_y = [&](const Values& v) { return picked(v, s.n, s.outputs, pixels, map_out); };
  const Layout dense = layout == kLast ? kLast : kPlanes;
  Map maps[] = {{type, layout, s.n, x_channels, s.height, s.width},
                {type, dense, s.n, y_channels, s.out_h, s.out_w},
                {type, layout, s.n, y_channels, s.out_h, s.out_w},
                {type, dense, s.n, y_channels, s.out_h, s.out_w},
                {type, dense, s.n, x_channels, s.height, s.width}};
  maps[0].fill(of_x(x));
  maps[1].fill(Values(size_t(s.n * y_channels * pixels), 0.0));
  maps[2].fill(of_y(grad_y));
  maps[3].fill(of_y(saved));
  maps[4].fill(Values(size_t(s.n * x_channels * x_pixels), 0.0));
  const bool weight_last = coin();  // the weight in channels-last order, as its gradient
  Map weights(type, weight_last ? kLast : kPlanes, s.outputs, ins, s.kh, s.kw), grad_weight = weights;
  weights.fill(weight);
  grad_weight.view.data = grad_weight.memory.data();
  grad_weight.fill(Values(weight.size(), 0.0));
  Memory shift(type, bias), gates(type, gate), in_gates(type, in_gate);
  Memory grad_bias(type, Values(size_t(s.outputs), 0.0)), grad_gate = grad_bias;
  Memory grad_in_gate(type, Values(size_t(s.channels), 0.0));

  MaskedForward f{};
  f.shape = s;
  f.dtype = type;
  f.x = maps[0].view;
  f.y = maps[1].view;
  f.weight = weights.view;
  f.bias = shift.data();
  f.gate = gated ? gates.data() : nullptr;
  f.in_gate = in_gated ? in_gates.data() : nullptr;
  f.live_in = list_of(live_in, s.channels);
  f.live_out = list_of(live_out, s.outputs);
  f.compact_maps = compact;
  f.act = act;
  f.algorithm = algorithm;
  masked_forward_cpu(f, env);
  const std::string name = name_of("masked", s, type, act) + " algorithm " + std::to_string(int(algorithm)) +
                           (compact ? " compact" : "") + (layout == kLast ? " channels last" : "");
  expect(name, type, maps[1].values(), of_y(y));
  expect(name + " writes outside of its map", maps[1].memory.intact());

  MaskedBackward b{};
  b.shape = s;
  b.dtype = type;
  b.x = f.x;
  b.grad_y = maps[2].view;
  if (act != Act::none) b.saved = maps[3].view;
  b.weight = f.weight;
  b.bias = f.bias;
  b.gate = f.gate;
  b.in_gate = f.in_gate;
  b.live_in = f.live_in;
  b.live_out = f.live_out;
  b.compact_maps = compact;
  b.act = act;
  b.algorithm = algorithm;
  b.grad_x = maps[4].view;
  b.grad_weight = grad_weight.memory.data();
  const View& g = grad_weight.view;
  const int64_t strides[] = {g.n, g.c, g.h, g.w};
  std::copy(strides, strides + 4, b.grad_weight_strides);
  b.grad_bias = grad_bias.data();
  if (gated) b.grad_gate = grad_gate.data();
  if (in_gated) b.grad_in_gate = grad_in_gate.data();
  masked_backward_cpu(b, env);

  Values dx(x.size(), 0.0), dw(weight.size(), 0.0), db(size_t(s.outputs), 0.0), dg = db, di(size_t(s.channels), 0.0),
                                                                                conv_grad = y;
  std::vector<char> alive_in(size_t(s.channels), 0), alive_out(size_t(s.outputs), 0);
  for (int64_t c : live_in) alive_in[size_t(c)] = 1;
  for (int64_t o : live_out) alive_out[size_t(o)] = 1;
  for (size_t i = 0; i < y.size(); ++i) {
    const size_t o = i / size_t(pixels) % size_t(s.outputs);
    const double own = alive_out[o] ? grad_y[i] * slopes[i] : 0;
    conv_grad[i] = own * gate[o];
    db[o] += conv_grad[i];
    dg[o] += own * (sums[i] + bias[o]);
  }
  each_product(s, [&](int64_t i, int64_t w, int64_t o) {
    dw[size_t(w)] += conv_grad[size_t(o)] * scaled[size_t(i)];
    const size_t c = size_t(i / x_pixels % s.channels);
    const double own = alive_in[c] ? conv_grad[size_t(o)] * weight[size_t(w)] : 0;
    dx[size_t(i)] += own * in_gate[c];
    di[c] += own * x[size_t(i)];
  });
  const double terms = std::sqrt(double(s.n * pixels * ins * area));  // of sums that may cancel
  expect(name + " grad x", type, maps[4].values(), of_x(dx));
  expect(name + " grad weight", type, grad_weight.values(), dw);
  expect(name + " grad bias", type, grad_bias.values(db.size()), db);
  if (gated) expect(name + " grad gate", type, grad_gate.values(dg.size()), dg, terms);
  if (in_gated) expect(name + " grad in_gate", type, grad_in_gate.values(di.size()), di, terms);
  expect(name + " gradients write outside of their memory", maps[4].memory.intact() && grad_weight.memory.intact());
}

void check_norm(DType type) {
  const int64_t n = draw(1, 4), c = one_of({1, 3, 8, 13, 17, 33}), h = draw(1, 7), w = draw(1, 9), pixels = h * w;
  const Act act = any_act();
  const bool last = coin(), training = coin(), residual = coin(), gated = coin();
  const Index live = coin() ? all_of(c) : some_of(c);
  const double eps = 1e-3, count = double(n * pixels);
  Values x = normal(n * c * pixels), before = rounded(type, normal(n * c * pixels)), weight = rounded(type, normal(c));
  const Values bias = rounded(type, normal(c)), gate = gated ? rounded(type, normal(c)) : Values(size_t(c), 1.0);
  for (double& v : x) v += 3;
  x = rounded(type, x);
  if (!residual) before.assign(before.size(), 0.0);
  Values mean(size_t(c), 0.0), var = mean, y = before, slopes = before, normed(x.size(), 0.0),
                               grad_y = rounded(type, normal(n * c * pixels));
  std::vector<char> alive(size_t(c), 0);
  for (int64_t k : live) {
    alive[size_t(k)] = 1;
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n * pixels; ++i) sum += x[size_t((i / pixels * c + k) * pixels + i % pixels)];
    for (int64_t i = 0; i < n * pixels; ++i)
      squares += std::pow(x[size_t((i / pixels * c + k) * pixels + i % pixels)] - sum / count, 2);
    mean[size_t(k)] = training ? sum / count : 2.5;
    var[size_t(k)] = training ? squares / count : 1.5;
  }
  if (!training) mean = rounded(type, mean);
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t k = i / size_t(pixels) % size_t(c);
    normed[i] = alive[k] ? (x[i] - mean[k]) / std::sqrt(var[k] + eps) : 0;
    const double z = (alive[k] ? gate[k] * (weight[k] * normed[i] + bias[k]) : 0) + before[i];
    y[i] = activation(act, z);
    slopes[i] = slope(act, z);
    if (near_kink(act, z)) grad_y[i] = 0;
  }
  const Layout layout = last ? kLast : kPlanes;
  const auto map = [&] { return Map(type, layout, n, c, h, w); };
  Map from = map(), to = map(), added = map(), dy = map(), dx = map(), dr = map();
  from.fill(x);
  added.fill(before);
  dy.fill(grad_y);
  const Values zeros(size_t(c), 0.0);
  Memory weights(type, weight), shift(type, bias), gates(type, gate), means(type, training ? zeros : mean),
      vars(type, training ? zeros : var);
  Memory dw(type, zeros), db(type, zeros), dg(type, zeros);
  BatchNorm p{};
  p.n = n;
  p.channels = p.vector_channels = c;
  p.pixels = pixels;
  p.channels_last = last || pixels == 1;
  p.dtype = type;
  p.x = from.memory.data();
  if (residual) p.residual = added.memory.data();
  p.weight = weights.data();
  p.bias = shift.data();
  if (gated) p.gate = gates.data();
  p.live = list_of(live, c);
  p.training = training;
  p.eps = eps;
  p.act = act;
  p.mean = means.data();
  p.var = vars.data();
  p.y = to.memory.data();
  p.grad_y = dy.memory.data();
  p.grad_x = dx.memory.data();
  if (residual) p.grad_residual = dr.memory.data();
  p.grad_weight = dw.data();
  p.grad_bias = db.data();
  if (gated) p.grad_gate = dg.data();
  Blocks blocks;
  const Env env = env_of(blocks);
  cpu_kernels().batch_norm_forward[type == DType::f64](p, env);
  char name[160];
  std::snprintf(name, sizeof(name), "norm n%d c%d pixels %d last %d training %d live %d type %d act %d", int(n), int(c),
                int(pixels), int(last), int(training), int(live.size()), int(type), int(act));
  // Few pixels may have next to no variance: what is divided by it loses as many digits.
  double gain = 1;
  for (int64_t k : live)
    gain = std::max(gain, std::fabs(gate[size_t(k)] * weight[size_t(k)]) / std::sqrt(var[size_t(k)] + eps));
  const std::string of = name;
  expect(of, type, to.values(), y, gain);
  expect(of + " mean", type, means.values(size_t(c)), mean);
  expect(of + " var", type, vars.values(size_t(c)), var);
  cpu_kernels().batch_norm_backward[type == DType::f64](p, env);
  Values g(x.size(), 0.0), sums = zeros, products = zeros, wanted_x = g, wanted_gate = zeros;
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t k = i / size_t(pixels) % size_t(c);
    g[i] = grad_y[i] * slopes[i];
    if (alive[k]) sums[k] += g[i], products[k] += g[i] * normed[i];
  }
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t k = i / size_t(pixels) % size_t(c);
    const double moved = training ? (sums[k] + normed[i] * products[k]) / count : 0;
    wanted_x[i] = alive[k] ? gate[k] * weight[k] / std::sqrt(var[k] + eps) * (g[i] - moved) : 0;
  }
  for (size_t k = 0; k < size_t(c); ++k) {
    wanted_gate[k] = weight[k] * products[k] + bias[k] * sums[k];
    products[k] *= gate[k];
    sums[k] *= gate[k];
  }
  expect(of + " grad x", type, dx.values(), wanted_x, gain * gain);
  if (residual) expect(of + " grad residual", type, dr.values(), g, gain);
  expect(of + " grad weight", type, dw.values(size_t(c)), products, gain * std::sqrt(count));
  expect(of + " grad bias", type, db.values(size_t(c)), sums, gain * std::sqrt(count));
  if (gated) expect(of + " grad gate", type, dg.values(size_t(c)), wanted_gate, gain * std::sqrt(count));
}

// Convolution by Winograd, max-pool, an inverted residual depth first, mean: threads share every step, or take whole slices.
void check_segment(int64_t n, int64_t slice, int threads) {
  const ConvShape first = conv_shape(n, 9, 14, 18, 20, 3, 3, 1, 1), expand = conv_shape(n, 20, 7, 9, 37, 1, 1, 1, 0);
  const ConvShape depthwise = conv_shape(n, 37, 7, 9, 37, 3, 3, 1, 1, 1, 37), project = conv_shape(n, 37, 7, 9, 20, 1, 1, 1, 0);
  const ConvShape* shapes[] = {&first, &expand, &depthwise, &project};
  const Act acts[] = {Act::relu6, Act::hardswish, Act::silu, Act::none};
  const int tiles[] = {4, 0, 0, 0};
  Blocks blocks;
  std::vector<Values> weight, bias;
  std::vector<Memory> memory;
  for (int i = 0; i < 4; ++i) {
    const ConvShape& s = *shapes[i];
    weight.push_back(rounded(DType::f32, normal(w_count(s), 1 / std::sqrt(double(s.channels / s.groups * s.kh * s.kw)))));
    bias.push_back(rounded(DType::f32, normal(s.outputs)));
    Memory plain(DType::f32, weight.back());
    memory.push_back(packed_weight(s, DType::f32, tiles[i], plain, env_of(blocks)));
    memory.emplace_back(DType::f32, bias.back());
  }
  std::vector<const float*> tensors;
  for (Memory& m : memory) tensors.push_back(static_cast<const float*>(m.data()));
  const Values x = rounded(DType::f32, normal(x_count(first)));
  const auto layer = [&](int i, const Values& from) {
    Values y = convolved(*shapes[i], from, weight[size_t(i)]);
    const size_t pixels = size_t(shapes[i]->out_h * shapes[i]->out_w);
    for (size_t k = 0; k < y.size(); ++k)
      y[k] = activation(acts[i], y[k] + bias[size_t(i)][k / pixels % size_t(shapes[i]->outputs)]);
    return y;
  };
  const Values whole = layer(0, x);
  Values pooled, wanted;
  for (int64_t plane = 0; plane < n * 20; ++plane)
    for (int64_t p = 0; p < 7 * 9; ++p) {
      double most = -1e30;
      for (int64_t h = std::max<int64_t>(0, p / 9 * 2 - 1); h < std::min<int64_t>(14, p / 9 * 2 + 2); ++h)
        for (int64_t w = std::max<int64_t>(0, p % 9 * 2 - 1); w < std::min<int64_t>(18, p % 9 * 2 + 2); ++w)
          most = std::max(most, whole[size_t((plane * 14 + h) * 18 + w)]);
      pooled.push_back(most);
    }
  const Values inner = layer(3, layer(2, layer(1, pooled)));
  for (int64_t plane = 0; plane < n * 20; ++plane) {
    double sum = 0;
    for (size_t p = 0; p < 63; ++p) sum += inner[size_t(plane) * 63 + p] + pooled[size_t(plane) * 63 + p];
    wanted.push_back(sum / 63);
  }
  const int64_t a = 0, b = 14 * 18 * 20, c = b + 7 * 9 * 20;
  const auto step = [](int64_t kind, int64_t in, int64_t out, const ConvShape& s) {
    SegmentStep t{};
    t.kind = kind;
    t.in = in;
    t.out = out;
    t.residual = t.bias = kNone;
    t.channels = s.channels;
    t.height = s.height;
    t.width = s.width;
    t.outputs = s.outputs;
    t.out_h = s.out_h;
    t.out_w = s.out_w;
    t.kh = s.kh;
    t.kw = s.kw;
    t.stride_h = t.stride_w = s.stride_h;
    t.pad_h = t.pad_w = s.pad_h;
    t.dil_h = t.dil_w = 1;
    t.groups = s.groups;
    t.in_step = in == kInside ? 0 : s.channels;
    t.out_step = out == kInside ? 0 : s.outputs;
    return t;
  };
  std::vector<SegmentStep> steps{
      step(kConv, kFromInput, a, first), step(kMaxPool, a, b, conv_shape(n, 20, 14, 18, 20, 3, 3, 2, 1, 1, 20)),
      step(kConv, b, kInside, expand),   step(kConv, kInside, kInside, depthwise),
      step(kConv, kInside, c, project),  step(kMean, c, kToOutput, conv_shape(n, 20, 7, 9, 20, 7, 9, 1, 0, 1, 20))};
  const int of_step[] = {0, -1, 1, 2, 3};
  for (size_t i = 0; i < 5; ++i)
    if (of_step[i] >= 0) {
      steps[i].weight = 2 * of_step[i];
      steps[i].bias = 2 * of_step[i] + 1;
      steps[i].act = int64_t(acts[of_step[i]]);
      steps[i].tile = tiles[of_step[i]];
    }
  steps[4].residual = b;
  steps[4].residual_step = 20;
  const SegmentHeader header{2, int64_t(steps.size()), 9, 14, 18, 20, 1, 1, c + 7 * 9 * 20, slice};
  Map from(DType::f32, kLast, n, 9, 14, 18), y(DType::f32, kLast, n, 20, 1, 1);
  from.fill(x);
  run_segment_cpu(Segment{&header, steps.data(), tensors.data(), from.view, static_cast<float*>(y.memory.data()), n},
                  env_of(blocks, threads));
  expect("segment of " + std::to_string(n) + " images, slices of " + std::to_string(slice) + ", threads " +
             std::to_string(threads),
         DType::f32, y.values(), wanted);
}

DType any_type(bool half) { return DType(draw(0, half ? 3 : 1)); }
ConvShape any_shape() {
  const int64_t kind = draw(0, 4), k = one_of({1, 1, 3, 3, 5}), pad = draw(0, 2), stride = one_of({1, 1, 2, 3}),
                dil = one_of({1, 1, 2});
  const int64_t groups = kind == 0 ? one_of({3, 17, 70}) : kind == 1 ? draw(2, 3) : 1;
  const int64_t c = kind == 0 ? groups : groups * one_of({1, 2, 3, 8, 13, 20});
  const int64_t o = kind == 0 ? groups * one_of({1, 1, 2}) : groups * one_of({1, 3, 8, 9, 16, 17, 33, 49});
  const int64_t least = std::max<int64_t>(1, dil * (k - 1) + 1 - 2 * pad);
  const int64_t n = draw(1, 3), h = least + draw(0, 9), w = least + draw(0, 9);
  return conv_shape(n, c, h, w, o, k, k, stride, pad, dil, groups);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1;
  const int w3 = kStridedTile + 3, w4 = kStridedTile + 4, w5 = kStridedTile + 5;
  for (Layout layout : {kLast, kPlanes}) {
    const DType f32 = DType::f32;
    for (int64_t c : {9, 21}) {
      check_compact(conv_shape(2, c, 11, 13, 33, 3, 3, 1, 1), f32, layout, 2, true);
      check_compact(conv_shape(2, c, 13, 14, 17, 3, 3, 1, 1), f32, layout, 4, true);
      check_compact(conv_shape(1, c, 13, 14, 24, 5, 5, 1, 2), f32, layout, 2, true);
      check_compact(conv_shape(1, c, 47, 45, 17, 3, 3, 2, 1), f32, layout, w4, true);
      check_compact(conv_shape(1, c, 40, 39, 17, 3, 3, 2, 1), f32, layout, w5, true);
      check_compact(conv_shape(1, c, 31, 32, 9, 5, 5, 2, 2), f32, layout, w4, true);
      check_compact(conv_shape(1, c == 9 ? 3 : 6, 29, 30, 9, 7, 7, 2, 3), f32, layout, w3, true);
      check_compact(conv_shape(1, c, 24, 26, 17, 3, 3, 1, 2, 2), f32, layout, 4, true);
    }
    for (int64_t o : {64, 121, 128}) check_compact(conv_shape(2, 97, 7, 9, o, 1, 1, 1, 0), f32, layout, kStrassenTile);
    for (int64_t k : {3, 5, 7})
      for (int64_t stride : {1, 2})
        for (int64_t c : {3, 15, 33, 64}) check_compact(conv_shape(1, c, 13, 11, c, k, k, stride, k / 2, 1, c), f32, layout, 0);
    for (Algorithm algorithm : {Algorithm::automatic, Algorithm::direct, Algorithm::winograd2, Algorithm::winograd4})
      check_masked(conv_shape(2, 20, 12, 13, 24, 3, 3, 1, 1), f32, layout, algorithm);
    check_masked(conv_shape(17, 19, 2, 2, 18, 3, 3, 1, 1), f32, layout, Algorithm::automatic, true);  // small maps
    for (int64_t c : {1, 2, 3, 4}) {  // neighbouring columns together
      check_masked(conv_shape(2, 5, 12, 12, c, 3, 3, 1, 1), f32, layout, Algorithm::automatic, true);
      check_masked(conv_shape(2, c, 12, 16, 6, 3, 3, 2, 1), f32, layout, Algorithm::automatic, true);
    }
  }
  for (int i = 0; i < 60 * rounds; ++i) {
    // In this order with every compiler.
    const ConvShape one = any_shape(), other = any_shape();
    const DType type = any_type(true), wide = any_type(false);
    const Layout layout = Layout(draw(0, 2)), another = Layout(draw(0, 2));
    check_compact(one, type, layout, 0);
    check_masked(other, wide, another, Algorithm::automatic);
    check_norm(any_type(false));
  }
  for (int threads : {1, 2}) {
    check_segment(1, 1, threads);
    check_segment(3, 2, threads);
    check_segment(4, 1, threads);
  }
  std::printf("%d checks on level %s, %d wrong\n", checks, cpu_level_name(), failures);
  return failures != 0;
}
