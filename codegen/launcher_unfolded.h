// A decode call in the shapes of the public interface. A program takes (b, h_k, rows, d), rows = seq_len_q * group_size;
// callers have queries (b, s_q, h_q, d) and a log-sum-exp (b, h_q, s_q). Strides say the same without a view in Python.
namespace tilemla {

// A tensor argument that looks folded: what DLPack describes by pointers lies beside it.
template <int kNdim>
struct Folded {
  DLTensor tensor;
  int64_t shape[kNdim];
  int64_t strides[kNdim];

  void pass_as(TVMFFIAny& arg) {
    tensor.ndim = kNdim;
    tensor.shape = shape;
    tensor.strides = strides;
    arg = TVMFFIAny{};
    arg.type_index = kTVMFFIDLTensorPtr;
    arg.v_ptr = &tensor;
  }
};

TILEMLA_COLD void bad_room(Where where, int64_t at_least, int64_t received, const char* reason) {
  TVM_FFI_THROW(ValueError) << where.program << ": argument " << where.argument << " must have shape[0] of at least "
                            << at_least << reason << ", got " << received;
  __builtin_unreachable();
}

TILEMLA_COLD void bad_value(Where where, int64_t expected, const char* meaning, int64_t received) {
  TVM_FFI_THROW(ValueError) << where.program << ": argument " << where.argument << " must be " << expected << meaning
                            << ", got " << received;
  __builtin_unreachable();
}

static inline const DLTensor* tensor_arg(Where where, const TVMFFIAny& arg, int ndim) {
  const DLTensor* tensor = tensor_arg(where, arg);
  if (tensor->ndim != ndim) bad_ndim(where, ndim, tensor);
  return tensor;
}

// How a call's heads are folded; its sizes are those of q and the cache.
class Heads {
 public:
  Heads(const char* program, const TVMFFIAny& q, const TVMFFIAny& kcache, const TVMFFIAny& seq_len_q,
        const TVMFFIAny& group_size)
      : program_(program) {
    const DLTensor* queries = tensor_arg({program, "q"}, q, 4);
    const DLTensor* cache = tensor_arg({program, "kcache"}, kcache, 4);
    batch_size_ = queries->shape[0], seq_len_q_ = queries->shape[1], heads_q_ = queries->shape[2];
    heads_k_ = cache->shape[2];
    if (cache->shape[0] < 1) bad_room({program, "kcache"}, 1, cache->shape[0], "");
    group_ = heads_k_ > 0 ? heads_q_ / heads_k_ : 0;
    if (group_ * heads_k_ != heads_q_) bad_dim({program, "kcache"}, 2, " (a divisor, q.shape[2])", heads_q_, cache);
    if (heads_k_ > 1 && seq_len_q_ > 1) bad_dim({program, "q"}, 1, " (with several KV heads)", 1, queries);
    expect({program, "seq_len_q"}, seq_len_q_, " (from q.shape[1])", seq_len_q);
    expect({program, "group_size"}, group_, " (q.shape[2] / kcache.shape[2])", group_size);
  }

  int64_t batch_size() const { return batch_size_; }

  // (b, s_q, h_q, d) to (b, h_k, rows, d).
  void fold_rows(const char* argument, TVMFFIAny& arg, Folded<4>& folded) const {
    const DLTensor* tensor = tensor_arg({program_, argument}, arg, 4);
    fold(argument, tensor, 1, 2, folded);
    folded.shape[3] = tensor->shape[3];
    folded.strides[3] = tensor->strides ? tensor->strides[3] : 1;
    folded.pass_as(arg);
  }

  // (b, h_q, s_q) to (b, h_k, rows).
  void fold_lse(const char* argument, TVMFFIAny& arg, Folded<3>& folded) const {
    fold(argument, tensor_arg({program_, argument}, arg, 3), 2, 1, folded);
    folded.pass_as(arg);
  }

 private:
  static void expect(Where where, int64_t expected, const char* meaning, const TVMFFIAny& arg) {
    const int64_t received = int_arg(where, arg);
    if (received != expected) bad_value(where, expected, meaning, received);
  }

  template <int kNdim>
  void fold(const char* argument, const DLTensor* tensor, int query_axis, int head_axis, Folded<kNdim>& folded) const {
    const Where where{program_, argument};
    const int64_t* shape = tensor->shape;
    if (shape[0] != batch_size_) bad_dim(where, 0, " (from q.shape[0])", batch_size_, tensor);
    if (shape[query_axis] != seq_len_q_) bad_dim(where, query_axis, " (from q.shape[1])", seq_len_q_, tensor);
    if (shape[head_axis] != heads_q_) bad_dim(where, head_axis, " (from q.shape[2])", heads_q_, tensor);
    int64_t strides[kNdim];
    int64_t compact = 1;
    for (int i = kNdim - 1; i >= 0; --i) {
      strides[i] = tensor->strides ? tensor->strides[i] : compact;
      compact *= shape[i];
    }
    // A row is query * group_size + head. The stride of a dimension of one says nothing.
    const int64_t row = heads_q_ == 1 ? strides[query_axis] : strides[head_axis];
    if (seq_len_q_ > 1 && strides[query_axis] != heads_q_ * row) {
      bad_stride(where, query_axis, " (each query's heads after those before it)", heads_q_ * row, strides, kNdim);
    }
    const int64_t rows = seq_len_q_ * group_;
    folded.tensor = *tensor;
    folded.shape[0] = batch_size_, folded.shape[1] = heads_k_, folded.shape[2] = rows;
    folded.strides[0] = strides[0], folded.strides[1] = rows * row, folded.strides[2] = row;
  }

  const char* program_;
  int64_t batch_size_, seq_len_q_, heads_q_, heads_k_, group_;
};

// What a program itself cannot know to be wrong: its sizes are free.
static inline void expect_room(const char* program, int64_t batch_size, const TVMFFIAny& block_table,
                               const TVMFFIAny& tile_scheduler_metadata, const TVMFFIAny& num_splits,
                               const TVMFFIAny& out_accum) {
  const DLTensor* table = tensor_arg({program, "block_table"}, block_table, 2);
  if (table->shape[1] < 1) bad_dim({program, "block_table"}, 1, " or more", 1, table);
  const int64_t parts = tensor_arg({program, "tile_scheduler_metadata"}, tile_scheduler_metadata, 2)->shape[0];
  const int64_t splits = tensor_arg({program, "num_splits"}, num_splits, 1)->shape[0];
  if (splits < batch_size + 1) bad_room({program, "num_splits"}, batch_size + 1, splits, " (b + 1)");
  const int64_t room = tensor_arg({program, "out_accum"}, out_accum, 4)->shape[0];
  if (room < batch_size + parts) bad_room({program, "out_accum"}, batch_size + parts, room, " (b + num_sm_parts)");
}

}  // namespace tilemla
