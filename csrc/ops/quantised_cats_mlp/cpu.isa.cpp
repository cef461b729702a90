// The gated MLP on quantised weights for one CPU instruction set. See cpu.h for the plan.
#include "ops/quantised_cats_mlp/cpu.h"

#include "common/activations.h"
#include "cpu/simd/arena.h"
#include "cpu/simd/dot.h"
#include "cpu/simd/quantised_rows.h"
#include "cpu/simd/tile.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace quantised;

static_assert(kMaxTokens == kQuantisedCatsMaxTokens);

constexpr int64_t kRound = 512;    // neurons whose gates are computed before the up products of the active ones
constexpr int64_t kColumns = 512;  // of down rows, widened at a time where several tokens want them

/// What a thread works in.
struct Own {
  float *gate, *h;   // [tokens, kRound] by neuron; by place in the list of active neurons
  float* tile;       // [kPanel, kColumns]
  float* sums;       // [tokens, ld], where 32 neurons share scales
  int32_t* index;    // [kRound] the active neurons
  uint16_t* wanted;  // [kRound] the tokens that want each
  int64_t bytes;

  Own(const QuantisedCatsMlpParams& p, const QuantisedCatsMlpScratch& s, void* memory) {
    Arena arena(memory);
    gate = arena.take<float>(p.tokens * kRound);
    h = arena.take<float>(p.tokens * kRound);
    tile = arena.take<float>(kPanel * kColumns);
    sums = arena.take<float>(p.down_scales == nullptr ? 0 : p.tokens * s.ld);
    index = arena.take<int32_t>(kRound);
    wanted = arena.take<uint16_t>(kRound);
    bytes = arena.used();
  }
};

// ------------------------------------------------------------------------------------------------------- the gate

template <Activation kAct, bool kInclusive>
void activate_run(const float* threshold, int64_t stride, float* z, int64_t n, bool* active) {
  for (int64_t i = 0; i < n; ++i) z[i] = activate<kAct>(z[i]);
  if (stride == 0) {
    const float t = *threshold;
    for (int64_t i = 0; i < n; ++i) active[i] = is_active(z[i], t, kInclusive);
  } else {
    for (int64_t i = 0; i < n; ++i) active[i] = is_active(z[i], threshold[i * stride], kInclusive);
  }
}

template <Activation kAct>
void activate_run(const QuantisedCatsMlpParams& p, int64_t first, float* z, int64_t n, bool* active) {
  const float* threshold = p.threshold + first * p.threshold_stride;
  p.inclusive ? activate_run<kAct, true>(threshold, p.threshold_stride, z, n, active)
              : activate_run<kAct, false>(threshold, p.threshold_stride, z, n, active);
}

/// z[0 .. n) = f(z) of the neurons from `first` on, and which of them are active.
void activate_run(const QuantisedCatsMlpParams& p, int64_t first, float* z, int64_t n, bool* active) {
  switch (p.activation) {
    case Activation::kSilu:
      return activate_run<Activation::kSilu>(p, first, z, n, active);
    case Activation::kGeluTanh:
      return activate_run<Activation::kGeluTanh>(p, first, z, n, active);
    case Activation::kGelu:
      return activate_run<Activation::kGelu>(p, first, z, n, active);
    default:
      return activate_run<Activation::kRelu>(p, first, z, n, active);
  }
}

/// The active ones of neurons [first, first + n), whose z is in own.gate, into own.index and own.wanted; the mask.
/// Returns their number.
int64_t select(const QuantisedCatsMlpParams& p, const Own& own, int64_t first, int64_t n) {
  uint16_t bits[kRound] = {};
  for (int64_t t = 0; t < p.tokens; ++t) {
    bool* active = p.mask + t * p.intermediate + first;
    activate_run(p, first, own.gate + t * kRound, n, active);
    for (int64_t i = 0; i < n; ++i) bits[i] = static_cast<uint16_t>(bits[i] | active[i] << t);
  }
  if (p.union_mask) {
    const auto all = static_cast<uint16_t>((1u << p.tokens) - 1);
    for (int64_t i = 0; i < n; ++i) bits[i] = bits[i] != 0 ? all : 0;
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t i = 0; i < n; ++i) p.mask[t * p.intermediate + first + i] = bits[i] != 0;
  }
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    own.index[count] = static_cast<int32_t>(i);
    own.wanted[count] = bits[i];
    count += bits[i] != 0;
  }
  return count;
}

// ------------------------------------------------------------------------------------------------------- the down rows

/// y += h row j, in order, for the rows [begin, end) of a list; one token.
template <QuantisedFormat kFormat, bool kScaled, int R>
void add_one(const RowList& list, int64_t begin, int64_t end, const float* h, float* y) {
  const int64_t distance = list.distance(R);
  const auto tile = [&]<int N>(int64_t j) {
    Row rows[N], next[N];
    for (int r = 0; r < N; ++r) rows[r] = list.at(j + r), next[r] = list.ahead(j + r + distance, j + r);
    add_weighted<kFormat, kScaled, N>(rows, next, h + j, list.groups, y);
  };
  int64_t j = begin;
  for (; j + R <= end; j += R) tile.template operator()<R>(j);
  for (; j < end; ++j) tile.template operator()<1>(j);
}

/// The same for several tokens: rows are widened once, a slice at a time, and added for those that want them.
template <QuantisedFormat kFormat, bool kScaled>
void add_panel(const RowList& list, const Own& own, int64_t begin, int rows, int tokens, int64_t ld, float* y) {
  constexpr int64_t kSlice = kColumns / kGroup, kCodes = code_bytes(kFormat), kFetch = 1024 / kCodes;
  constexpr int kRun = 8;  // vectors of y in registers
  int list_of[kMaxTokens][kPanel], count[kMaxTokens] = {};
  float factor[kMaxTokens][kPanel];
  bool dense = true;  // every token wants every row
  for (int r = 0; r < rows; ++r) {
    dense = dense && own.wanted[begin + r] == (1u << tokens) - 1;
    for (unsigned bits = own.wanted[begin + r]; bits != 0; bits &= bits - 1) {
      const int t = __builtin_ctz(bits);
      factor[t][count[t]] = own.h[t * kRound + begin + r];
      list_of[t][count[t]++] = r;
    }
  }
  const int64_t groups = list.groups, distance = smaller(kFetch, groups);
  for (int64_t g = 0; g < groups; g += kSlice) {
    const int64_t here = smaller(kSlice, groups - g), length = here * kGroup;
    for (int r = 0; r < rows; ++r) {
      const bool inside = g + distance < groups;
      const Row row = list.at(begin + r), later = inside ? row : list.ahead(begin + r + kPanel, begin + r);
      const int64_t by = distance - (inside ? 0 : groups);
      const Row fetched{later.codes + by * kCodes, later.scale + by, later.minimum + by};
      dequantise<kFormat, kScaled>(row, fetched, g, here, own.tile + r * kColumns);
    }
    float* to = y + g * kGroup;
    if (dense) {
      in_tiles<kTokensWith<2>>(tokens, [&]<int T>(int t) {
        const float* h = own.h + t * kRound + begin;
        for (int64_t c = 0; c < length; c += kGroup) {
          outer_tile<kVecs, T>(own.tile + c, kColumns, rows, h, kRound, to + t * ld + c, ld);
        }
      });
      continue;
    }
    for (int t = 0; t < tokens; ++t) {
      int64_t c = 0;
      for (; c + kRun * kLanes <= length; c += kRun * kLanes) {
        add_rows<kRun>(own.tile + c, kColumns, list_of[t], factor[t], count[t], to + t * ld + c);
      }
      for (; c < length; c += kGroup) {
        add_rows<kVecs>(own.tile + c, kColumns, list_of[t], factor[t], count[t], to + t * ld + c);
      }
    }
  }
}

template <QuantisedFormat kFormat, bool kScaled>
void add(const RowList& list, const Own& own, int64_t begin, int64_t end, int tokens, int64_t ld, float* y) {
  if (tokens == 1) {
    return 4 * list.bytes > kInFlight ? add_one<kFormat, kScaled, 2>(list, begin, end, own.h, y)
                                      : add_one<kFormat, kScaled, 4>(list, begin, end, own.h, y);
  }
  for (int64_t j = begin; j < end; j += kPanel) {
    add_panel<kFormat, kScaled>(list, own, j, static_cast<int>(smaller(kPanel, end - j)), tokens, ld, y);
  }
}

/// The rows [begin, end) of a list are those of a block of 32 neurons: sums of their integers, then once its scales.
template <QuantisedFormat kFormat>
void add_block(const QuantisedCatsMlpParams& p, const RowList& list, const Own& own, const uint8_t* scales,
               const uint8_t* later, int64_t begin, int64_t end, int64_t ld, float* y) {
  const int tokens = static_cast<int>(p.tokens);
  zero_words(own.sums, tokens * ld);
  add<kFormat, false>(list, own, begin, end, tokens, ld, own.sums);
  const Half *scale = reinterpret_cast<const Half*>(scales), *minimum = scale + p.hidden;
  const int64_t bytes = p.hidden * (group_bytes(kFormat) - code_bytes(kFormat));
  for (int64_t i = 0; i < bytes; i += 64) prefetch(later + i);
  for (int t = 0; t < tokens; ++t) {
    float total = 0.0f;
    bool any = false;
    for (int64_t j = begin; j < end; ++j) {
      if ((own.wanted[j] >> t & 1) != 0) total += own.h[t * kRound + j], any = true;
    }
    if (!any) continue;
    const Vec by = vec_set(total);
    for (int64_t k = 0; k < p.hidden; k += kLanes) {
      float* to = y + t * ld + k;
      Vec sum = vec_fma(vec_load(scale + k), vec_load(own.sums + t * ld + k), vec_load(to));
      if (has_minimum(kFormat)) sum = vec_fma(vec_load(minimum + k), by, sum);
      vec_store(to, sum);
    }
  }
}

template <QuantisedFormat kFormat>
void down(const QuantisedCatsMlpParams& p, const RowList& list, const Own& own, int64_t first, int64_t ld, float* y) {
  if (p.down_scales == nullptr) {
    return add<kFormat, true>(list, own, 0, list.count, static_cast<int>(p.tokens), ld, y);
  }
  const auto scales_of = [&](int64_t j) {
    const int64_t block = (first + own.index[j]) / kGroup;
    return p.down_scales + block * p.hidden * (group_bytes(kFormat) - code_bytes(kFormat));
  };
  for (int64_t begin = 0; begin < list.count;) {
    int64_t end = begin + 1;
    while (end < list.count && own.index[end] / kGroup == own.index[begin] / kGroup) ++end;
    const uint8_t* scales = scales_of(begin);
    add_block<kFormat>(p, list, own, scales, end < list.count ? scales_of(end) : scales, begin, end, ld, y);
    begin = end;
  }
}

// ------------------------------------------------------------------------------------------------------- the chunks

/// out[t kRound + j] += bias of neuron first + index[j], or first + j.
template <class T>
void add_bias(const void* bias, int64_t first, const int32_t* index, int64_t n, int64_t tokens, float* out) {
  if (bias == nullptr) return;
  const T* from = static_cast<const T*>(bias) + first;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < n; ++j) out[t * kRound + j] += to_float(from[index == nullptr ? j : index[j]]);
}

template <class T>
void chunk(const QuantisedCatsMlpParams& p, const QuantisedCatsMlpScratch& s, int64_t c, void* memory) {
  const Own own(p, s, memory);
  const Tokens x{s.x, s.ld, s.planes, s.ld_planes, p.groups(), static_cast<int>(p.tokens)};
  float* y = s.partial + c * p.tokens * s.ld;
  zero_words(y, p.tokens * s.ld);
  const int64_t groups = p.groups(), blocks = ceil_div(p.intermediate, kGroup);  // blocks are not cut
  const int64_t begin = blocks * c / s.chunks * kGroup;
  const int64_t end = smaller(p.intermediate, blocks * (c + 1) / s.chunks * kGroup);
  const auto rows = [&](const uint8_t* weight, int64_t bytes, QuantisedFormat format, int64_t first,
                        const int32_t* index, int64_t count, const RowList* then) {
    return RowList{weight + first * bytes, index, count, groups, bytes, code_bytes(format), then};
  };
  const int64_t gate_bytes = groups * group_bytes(p.gate), up_bytes = groups * group_bytes(p.up);
  const auto gates = [&](int64_t first) {
    return rows(p.w_gate, gate_bytes, p.gate, first, nullptr, clamp(end - first, 0, kRound), nullptr);
  };
  gates(begin).fetch_first();
  for (int64_t first = begin; first < end; first += kRound) {
    const RowList gate = gates(first), then = gates(first + gate.count);
    products(p.gate, gate, x, nullptr, own.gate, kRound);
    add_bias<T>(p.b_gate, first, nullptr, gate.count, p.tokens, own.gate);
    const int64_t count = select(p, own, first, gate.count);
    const RowList down_rows = rows(p.w_down, p.down_row_bytes(), p.down, first, own.index, count, &then);
    const RowList up = rows(p.w_up, up_bytes, p.up, first, own.index, count, &down_rows);
    up.fetch_first();
    products(p.up, up, x, own.wanted, own.h, kRound);
    add_bias<T>(p.b_up, first, own.index, count, p.tokens, own.h);
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t j = 0; j < count; ++j) own.h[t * kRound + j] *= own.gate[t * kRound + own.index[j]];
    by_format(p.down, [&]<QuantisedFormat kFormat>() { down<kFormat>(p, down_rows, own, first, s.ld, y); });
  }
}

template <class T>
void pack(const QuantisedCatsMlpParams& p, const QuantisedCatsMlpScratch& s, int64_t token) {
  const T* from = static_cast<const T*>(p.x) + token * p.hidden;
  float* x = s.x + token * s.ld;
  for (int64_t k = 0; k < p.hidden; k += kLanes) vec_store(x + k, vec_load(from + k));
  if (s.planes != nullptr) pack_planes(x, p.groups(), s.planes + token * s.ld_planes);
}

template <class T>
void reduce(const QuantisedCatsMlpParams& p, const QuantisedCatsMlpScratch& s, int64_t begin, int64_t end) {
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t k = begin; k < end; k += kLanes) {
      Vec sum = vec_zero();
      for (int64_t c = 0; c < s.chunks; ++c) sum = vec_add(sum, vec_load(s.partial + (c * p.tokens + t) * s.ld + k));
      if (p.b_down != nullptr) sum = vec_add(sum, vec_load(static_cast<const T*>(p.b_down) + k));
      vec_store(static_cast<T*>(p.y) + t * p.hidden + k, sum);
    }
}

int64_t own_bytes(const QuantisedCatsMlpParams& p, const QuantisedCatsMlpScratch& s) {
  return Own(p, s, nullptr).bytes;
}

template <class T>
constexpr QuantisedCatsMlpKernels kernels() {
  return {pack<T>, chunk<T>, reduce<T>, planes_floats, own_bytes};
}

}  // namespace

QuantisedCatsMlpKernels quantised_cats_mlp_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> QuantisedCatsMlpKernels { return kernels<T>(); });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
