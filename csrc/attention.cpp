// Attention over q, k and v, or over one packed qkv tensor.
#include "arena.h"
#include "common.h"
#include "matmul.h"

namespace gptfast {

namespace {

// t is (B, H, T, D); its last dimension is contiguous.
Heads heads(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

AttentionArgs arguments(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double dropout_p,
                        const OptionalTensor& seed, const OptionalTensor& kv_len) {
  CHECK_VALUE(q.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == k.size(0) && q.size(1) == k.size(1) &&
                  q.size(3) == k.size(3) && q.size(2) <= k.size(2),
              "attention: q, k and v do not fit: got ", q.sizes(), ", ", k.sizes(), " and ", v.sizes());
  CHECK_VALUE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
              "attention: q, k and v need one dtype, got ", q.scalar_type(), ", ", k.scalar_type(), " and ",
              v.scalar_type());
  AttentionArgs args{};
  args.dtype = dtype_of(q);
  args.parts = parts_asked_for();
  args.B = q.size(0);
  args.H = q.size(1);
  args.Tq = q.size(2);
  args.Tk = k.size(2);
  args.D = q.size(3);
  args.scale = scale;
  args.dropout_p = dropout_p;
  if (dropout_p > 0) {
    CHECK_VALUE(seed && seed->scalar_type() == kLong && seed->numel() == 1,
                "attention: dropout needs a 0-d int64 seed");
    args.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  }
  if (kv_len) {
    CHECK_VALUE(
        kv_len->scalar_type() == kLong && kv_len->dim() == 1 && kv_len->size(0) == args.B && kv_len->is_contiguous(),
        "attention: kv_len must be contiguous int64 of shape (B,)");
    args.kv_len = kv_len->const_data_ptr<int64_t>();
  }
  args.q = heads(q);
  args.k = heads(k);
  args.v = heads(v);
  return args;
}

// Whether the reference computes: in fp64, and where heads have no dimensions.
bool only_reference(const Tensor& x) { return x.scalar_type() == kDouble || (x.dim() > 0 && x.size(-1) == 0); }

void run_fwd(AttentionArgs& args, const Tensor& out, const Tensor& lse) {
  args.out = heads(out);
  args.lse = lse.data_ptr<double>();
  if (args.B * args.H * args.Tq == 0) return;
  const AttentionFwdLoops& fwd = *loops().attention_fwd;
  parallel_for(0, fwd.count_items(args), 1, [&](int64_t begin, int64_t end) { fwd.run(args, begin, end); });
}

void run_bwd(AttentionArgs& args, const Tensor& dout, const Tensor& out, const Tensor& lse, const Tensor& dq,
             const Tensor& dk, const Tensor& dv) {
  CHECK_VALUE(lse.scalar_type() == kDouble && lse.numel() == args.B * args.H * args.Tq && dout.sizes() == out.sizes() &&
                  dout.scalar_type() == out.scalar_type(),
              "attention: dout, out and lse do not fit the inputs");
  args.dout = heads(dout);
  args.dq = heads(dq);
  args.dk = heads(dk);
  args.dv = heads(dv);
  const AttentionBwdLoops& bwd = *loops().attention_bwd;
  parallel_for(0, args.B * args.H, 1, [&](int64_t begin, int64_t end) { bwd.run(args, begin, end); });
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, double scale,
                                         double dropout_p, const OptionalTensor& seed, const OptionalTensor& kv_len) {
  if (only_reference(q_in))
    return reference<decltype(attention_fwd)>("attention_fwd", q_in, k_in, v_in, scale, dropout_p, seed, kv_len);
  const Tensor q = contiguous_rows(q_in), k = contiguous_rows(k_in), v = contiguous_rows(v_in);
  AttentionArgs args = arguments(q, k, v, scale, dropout_p, seed, kv_len);
  Tensor out = make_tensor(q.sizes(), q.scalar_type());
  Tensor lse = empty({args.B, args.H, args.Tq}, kDouble);
  run_fwd(args, out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& q_in, const Tensor& k_in,
                                                 const Tensor& v_in, const Tensor& out, const Tensor& lse, double scale,
                                                 double dropout_p, const OptionalTensor& seed,
                                                 const OptionalTensor& kv_len) {
  if (only_reference(q_in))
    return reference<decltype(attention_bwd)>("attention_bwd", dout, q_in, k_in, v_in, out, lse, scale, dropout_p, seed,
                                              kv_len);
  const Tensor q = contiguous_rows(q_in), k = contiguous_rows(k_in), v = contiguous_rows(v_in);
  AttentionArgs args = arguments(q, k, v, scale, dropout_p, seed, kv_len);
  Tensor dq = make_tensor(q.sizes(), q.scalar_type()), dk = make_tensor(k.sizes(), k.scalar_type());
  Tensor dv = make_tensor(v.sizes(), v.scalar_type());
  run_bwd(args, contiguous_rows(dout), out, lse, dq, dk, dv);
  return {dq, dk, dv};
}

// Returns a view of t (B, T, C), or of one third of t (B, T, 3C), as (B, H, T, D).
Tensor split_heads(const Tensor& t, int64_t part, int64_t n_head, int64_t C) {
  const int64_t D = C / n_head;
  return t.view(part * C * t.stride(2), {t.size(0), n_head, t.size(1), D},
                {t.stride(0), D * t.stride(2), t.stride(1), t.stride(2)});
}

AttentionArgs packed_arguments(const Tensor& qkv, int64_t n_head, double scale, double dropout_p,
                               const OptionalTensor& seed, const OptionalTensor& kv_len) {
  CHECK_VALUE(qkv.dim() == 3 && n_head > 0 && qkv.size(2) % (3 * n_head) == 0, "attention_qkv: qkv ", qkv.sizes(),
              " does not divide into 3 x ", n_head, " heads");
  const int64_t C = qkv.size(2) / 3;
  return arguments(split_heads(qkv, 0, n_head, C), split_heads(qkv, 1, n_head, C), split_heads(qkv, 2, n_head, C),
                   scale, dropout_p, seed, kv_len);
}

std::tuple<Tensor, Tensor> attention_qkv_fwd(const Tensor& qkv_in, int64_t n_head, double scale, double dropout_p,
                                             const OptionalTensor& seed, const OptionalTensor& kv_len) {
  if (only_reference(qkv_in))
    return reference<decltype(attention_qkv_fwd)>("attention_qkv_fwd", qkv_in, n_head, scale, dropout_p, seed, kv_len);
  const Tensor qkv = contiguous_rows(qkv_in);
  AttentionArgs args = packed_arguments(qkv, n_head, scale, dropout_p, seed, kv_len);
  const int64_t C = args.H * args.D;
  Tensor out = make_tensor({args.B, args.Tq, C}, qkv.scalar_type());
  Tensor lse = empty({args.B, args.H, args.Tq}, kDouble);
  run_fwd(args, split_heads(out, 0, n_head, C), lse);
  return {out, lse};
}

Tensor attention_qkv_bwd(const Tensor& dout, const Tensor& qkv_in, const Tensor& out, const Tensor& lse, int64_t n_head,
                         double scale, double dropout_p, const OptionalTensor& seed, const OptionalTensor& kv_len) {
  if (only_reference(qkv_in))
    return reference<decltype(attention_qkv_bwd)>("attention_qkv_bwd", dout, qkv_in, out, lse, n_head, scale, dropout_p,
                                                  seed, kv_len);
  const Tensor qkv = contiguous_rows(qkv_in);
  AttentionArgs args = packed_arguments(qkv, n_head, scale, dropout_p, seed, kv_len);
  const int64_t C = args.H * args.D;
  CHECK_VALUE(out.sizes() == IntArrayRef({args.B, args.Tq, C}) && dout.sizes() == out.sizes(), "attention_qkv: dout ",
              dout.sizes(), " and out ", out.sizes(), " do not fit");
  Tensor dqkv = make_tensor(qkv.sizes(), qkv.scalar_type());
  run_bwd(args, split_heads(contiguous_rows(dout), 0, n_head, C), split_heads(out, 0, n_head, C), lse,
          split_heads(dqkv, 0, n_head, C), split_heads(dqkv, 1, n_head, C), split_heads(dqkv, 2, n_head, C));
  return dqkv;
}

const Kernels kernels = Kernels("CPU")
                            .add<attention_fwd>("attention_fwd")
                            .add<attention_bwd>("attention_bwd")
                            .add<attention_qkv_fwd>("attention_qkv_fwd")
                            .add<attention_qkv_bwd>("attention_qkv_bwd");

}  // namespace
}  // namespace gptfast
