// Parameters that the bindings of the feature map share.
#pragma once

#include "cpu/binding.h"
#include "ops/feature_map/cpu.h"

namespace subquad::cpu {

/// The options of the map; p.f is known.
inline void set_map_kind(FeatureMapParams& p, int64_t kind, bool fullspace, double eps) {
  STD_TORCH_CHECK(kind >= 0 && kind < kFeatureKindCount, "kind: unknown code ", kind);
  p.kind = static_cast<FeatureKind>(kind);
  STD_TORCH_CHECK(fullspace || p.kind != FeatureKind::kHedgehog2, "fullspace: expected true with this kind");
  p.fullspace = fullspace;
  p.features = fullspace ? 2 * p.f : p.f;
  p.eps = p.kind == FeatureKind::kElu1 ? -__builtin_inff() : static_cast<float>(eps);
}

}  // namespace subquad::cpu
