// The table of one instruction-set level, compiled once per level. setup.py says which loops each level compiles; the
// declarations are weak, so the linker puts a null pointer where this level has none.
//
// The table is constant data. Code that fills it when the module is loaded could contain instructions that this CPU
// does not have.
#include "loops.h"

namespace gptfast::GPTFAST_LEVEL {

[[gnu::weak]] extern const AttentionFwdLoops attention_fwd;
[[gnu::weak]] extern const AttentionBwdLoops attention_bwd;
[[gnu::weak]] extern const CrossEntropyLoops cross_entropy;
[[gnu::weak]] extern const AdamWLoops adamw;
[[gnu::weak]] extern const SamplingLoops sampling;
[[gnu::weak]] extern const MatmulLoops matmul;
[[gnu::weak]] extern const MatmulBf16Loops matmul_bf16;
[[gnu::weak]] extern const MatmulPartsLoops matmul_parts;
[[gnu::weak]] extern const NormLoops norm;
[[gnu::weak]] extern const MlpLoops mlp;
[[gnu::weak]] extern const EngineLoops engine;

extern constinit const Loops loops = {
    .attention_fwd = &attention_fwd,
    .attention_bwd = &attention_bwd,
    .cross_entropy = &cross_entropy,
    .adamw = &adamw,
    .sampling = &sampling,
    .matmul = &matmul,
    .matmul_bf16 = &matmul_bf16,
    .matmul_parts = &matmul_parts,
    .norm = &norm,
    .mlp = &mlp,
    .engine = &engine,
};

}  // namespace gptfast::GPTFAST_LEVEL
