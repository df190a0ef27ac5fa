// The part of ONNX Runtime's C interface that a custom operator needs, declared by hand, because no package on PyPI
// ships the header.
//
// OrtApi is a table of function pointers that only ever grows at its end, so the number of a slot belongs to the binary
// interface. All slots used here are in version 17 of the table (onnxruntime 1.17). Nothing is linked: the runtime hands
// the table to RegisterCustomOps.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

inline void* operator new(size_t, void* place) noexcept { return place; }

namespace ort {

constexpr uint32_t kVersion = 17;
enum ElementType { kFloat = 1, kUInt8 = 2, kInt32 = 6, kInt64 = 7 };
enum Presence { kRequired = 0, kOptional = 1 };

struct Status;
struct Options;
struct Domain;
struct Info;
struct Context;
struct Value;
struct ShapeInfo;
using Slot = void (*)();

// What RegisterCustomOps gets.
struct ApiBase {
  const Slot* (*get_api)(uint32_t version);
  const char* (*version_string)();
};

struct Shape {
  int64_t dims[8];
  size_t rank = 0;
  int64_t count() const {
    int64_t total = 1;
    for (size_t i = 0; i < rank; i++) total *= dims[i];
    return total;
  }
  int64_t last() const { return dims[rank - 1]; }
};

class Api {
 public:
  explicit Api(const Slot* slots) : slots_(slots) {}
  bool usable() const { return slots_ != nullptr; }

  Status* error(const char* text) const { return call<0, Status*>(int{1}, text); }
  Status* make_domain(const char* name, Domain** out) const { return call<26, Status*>(name, out); }
  Status* add_operator(Domain* domain, const void* op) const { return call<27, Status*>(domain, op); }
  Status* add_domain(Options* options, Domain* domain) const { return call<28, Status*>(options, domain); }

  // Whether somebody made an entry of this name in a session's options.
  bool has_entry(const Options* options, const char* name) const {
    int found = 0;
    drop(call<237, Status*>(options, name, &found));
    return found != 0;
  }

  // An attribute, or the fallback where the node does not have it.
  int64_t integer(const Info* info, const char* name, int64_t fallback) const {
    int64_t value = fallback;
    if (Status* missing = call<86, Status*>(info, name, &value)) call<93, void>(missing), value = fallback;
    return value;
  }
  float real(const Info* info, const char* name, float fallback) const {
    float value = fallback;
    if (Status* missing = call<85, Status*>(info, name, &value)) call<93, void>(missing), value = fallback;
    return value;
  }

  const Value* input(const Context* context, size_t index) const {
    const Value* value = nullptr;
    drop(call<90, Status*>(context, index, &value));
    return value;
  }
  Value* output(Context* context, size_t index, const Shape& shape) const {
    Value* value = nullptr;
    drop(call<91, Status*>(context, index, static_cast<const int64_t*>(shape.dims), shape.rank, &value));
    return value;
  }
  // The elements of a tensor; null for an optional input that is absent.
  template <class T> T* data(const Value* value) const {
    void* elements = nullptr;
    if (value) drop(call<51, Status*>(const_cast<Value*>(value), &elements));
    return static_cast<T*>(elements);
  }
  Shape shape(const Value* value) const {
    Shape found;
    ShapeInfo* info = nullptr;
    drop(call<65, Status*>(value, &info));
    drop(call<61, Status*>(static_cast<const ShapeInfo*>(info), &found.rank));
    if (found.rank > 8) found.rank = 8;
    drop(call<62, Status*>(static_cast<const ShapeInfo*>(info), static_cast<int64_t*>(found.dims), found.rank));
    call<99, void>(info);
    return found;
  }

  // Whether an input is absent or has so many elements.
  bool fits(const Value* value, int64_t count) const { return !value || shape(value).count() == count; }

  // Run f(0) .. f(count - 1) on the session's threads. Who takes which item does not matter to any result.
  template <class F> void parallel(const Context* context, int count, const F& f) const {
    if (count == 1) return f(0);
    struct Job { const F* f; int next, count; } job{&f, 0, count};
    auto work = [](void* argument, size_t) {
      Job& job = *static_cast<Job*>(argument);
      for (int item; (item = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED)) < job.count;) (*job.f)(item);
    };
    void (*worker)(void*, size_t) = work;
    size_t workers = count < 256 ? count : 256;
    if (count > 0) drop(call<274, Status*>(context, worker, workers, size_t{0}, static_cast<void*>(&job)));
  }

 private:
  template <int N, class R, class... A> R call(A... arguments) const {
    return reinterpret_cast<R (*)(A...)>(slots_[N])(arguments...);
  }
  void drop(Status* status) const {
    if (status) call<93, void>(status);
  }
  const Slot* slots_;
};

// OrtCustomOp of version 17: members in the header's order.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const Slot*, const Info*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_provider)(const CustomOp*);
  int (*get_input_type)(const CustomOp*, size_t);
  size_t (*get_input_count)(const CustomOp*);
  int (*get_output_type)(const CustomOp*, size_t);
  size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void*, Context*);
  void (*destroy)(void*);
  int (*get_input_presence)(const CustomOp*, size_t);
  int (*get_output_presence)(const CustomOp*, size_t);
  int (*get_input_memory)(const CustomOp*, size_t);
  int (*variadic_input_min)(const CustomOp*);
  int (*variadic_input_same)(const CustomOp*);
  int (*variadic_output_min)(const CustomOp*);
  int (*variadic_output_same)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const Slot*, const Info*, void**);
  Status* (*compute_v2)(void*, Context*);
  Status* (*infer_shape)(const CustomOp*, void*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  size_t (*may_inplace)(int**, int**);
  void (*release_may_inplace)(int*, int*);
  size_t (*alias_map)(int**, int**);
  void (*release_alias_map)(int*, int*);
};

struct Port {
  int type;
  int presence;
};

// An operator made from a class K with: static name(), inputs(n), outputs(n) (ports and their number);
// K(Api, const Info*); Status* run(Context*).
template <class K> struct Operator : CustomOp {
  Operator() : CustomOp{} {
    version = kVersion;
    get_name = [](const CustomOp*) { return K::name(); };
    get_provider = [](const CustomOp*) -> const char* { return nullptr; };
    get_input_type = [](const CustomOp*, size_t i) { return port(K::inputs, i).type; };
    get_input_count = [](const CustomOp*) { return count(K::inputs); };
    get_input_presence = [](const CustomOp*, size_t i) { return port(K::inputs, i).presence; };
    get_output_type = [](const CustomOp*, size_t i) { return port(K::outputs, i).type; };
    get_output_count = [](const CustomOp*) { return count(K::outputs); };
    get_output_presence = [](const CustomOp*, size_t i) { return port(K::outputs, i).presence; };
    get_input_memory = [](const CustomOp*, size_t) { return 0; };
    variadic_input_min = variadic_output_min = [](const CustomOp*) { return 1; };
    variadic_input_same = variadic_output_same = [](const CustomOp*) { return 1; };
    create_kernel_v2 = [](const CustomOp*, const Slot* slots, const Info* info, void** out) -> Status* {
      *out = new (malloc(sizeof(K))) K(Api(slots), info);
      return nullptr;
    };
    compute_v2 = [](void* kernel, Context* context) { return static_cast<K*>(kernel)->run(context); };
    destroy = [](void* kernel) { free(kernel); };
    start_version = [](const CustomOp*) { return 1; };
    end_version = [](const CustomOp*) { return 0x7FFFFFFF; };
  }

 private:
  using Ports = const Port* (*)(size_t*);
  static const Port& port(Ports ports, size_t index) {
    size_t n;
    return ports(&n)[index];
  }
  static size_t count(Ports ports) {
    size_t n;
    ports(&n);
    return n;
  }
};

}  // namespace ort
