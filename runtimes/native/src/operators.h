// The operators of domain herdgraph.cpu. Each file says what its operator means; docs/native.md repeats it with shapes.
#pragma once
#include "kernels.h"
#include "ort_api.h"

namespace herd {

class Project {
 public:
  static const char* name() { return "Project"; }
  static const ort::Port* inputs(size_t* count);
  static const ort::Port* outputs(size_t* count);
  Project(ort::Api api, const ort::Info* info, bool mapped = false);
  ort::Status* run(ort::Context* context) const;

 private:
  ort::Api api_;
  bool mapped_;
  Format format_;
  int channels_;
  float epsilon_;
  Activation activation_;
};

class Lookup {
 public:
  static const char* name() { return "Lookup"; }
  static const ort::Port* inputs(size_t* count);
  static const ort::Port* outputs(size_t* count);
  Lookup(ort::Api api, const ort::Info* info);
  ort::Status* run(ort::Context* context) const;

 private:
  ort::Api api_;
  Format format_;
  int channels_, width_;
};

class Mixture {
 public:
  static const char* name() { return "Mixture"; }
  static const ort::Port* inputs(size_t* count);
  static const ort::Port* outputs(size_t* count);
  Mixture(ort::Api api, const ort::Info* info, bool mapped = false);
  ort::Status* run(ort::Context* context) const;

 private:
  ort::Api api_;
  bool mapped_;
  mutable bool advised_ = false;
  Format format_, shared_format_;
  int experts_, all_experts_, first_expert_, top_k_, width_, shared_width_, hadamard_, shared_hadamard_;
  bool residual_;
  float epsilon_;
};

class FullAttention {
 public:
  static const char* name() { return "FullAttention"; }
  static const ort::Port* inputs(size_t* count);
  static const ort::Port* outputs(size_t* count);
  FullAttention(ort::Api api, const ort::Info* info);
  ort::Status* run(ort::Context* context) const;

 private:
  ort::Api api_;
  int heads_;
};

class PagedAttention {
 public:
  static const char* name() { return "PagedAttention"; }
  static const ort::Port* inputs(size_t* count);
  static const ort::Port* outputs(size_t* count);
  PagedAttention(ort::Api api, const ort::Info* info);
  ort::Status* run(ort::Context* context) const;

 private:
  ort::Api api_;
  int heads_, kv_heads_, chunk_;
  CacheType cache_type_;
  float norm_epsilon_;
};

// An operator whose weights are mapped and may not be in memory: it says what it will read as soon as it knows.
template <class K> class Mapped : public K {
 public:
  Mapped(ort::Api api, const ort::Info* info) : K(api, info, true) {}
};

}  // namespace herd
