// What ONNX Runtime calls when it loads the library.
#include "operators.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

// Made when the library is loaded, for sessions may be made in several threads at once.
static const ort::Operator<herd::Project> project;
static const ort::Operator<herd::Lookup> lookup;
static const ort::Operator<herd::Mixture> mixture;
static const ort::Operator<herd::FullAttention> full_attention;
static const ort::Operator<herd::PagedAttention> paged_attention;
static const ort::Operator<herd::Mapped<herd::Project>> mapped_project;
static const ort::Operator<herd::Mapped<herd::Mixture>> mapped_mixture;

extern "C" EXPORT ort::Status* RegisterCustomOps(ort::Options* options, const ort::ApiBase* base) {
  ort::Api api(base->get_api(ort::kVersion));
  if (!api.usable()) return nullptr;   // older than 1.17: the graph then fails to load, with the runtime's own message
  ort::Domain* domain = nullptr;       // one per session; it refers to the operators, which live as long as the library
  if (ort::Status* failed = api.make_domain("herdgraph.cpu", &domain)) return failed;
  const ort::CustomOp* in_memory[] = {&project, &lookup, &mixture, &full_attention, &paged_attention};
  const ort::CustomOp* mapped[] = {&mapped_project, &lookup, &mapped_mixture, &full_attention, &paged_attention};
  for (const ort::CustomOp* each : api.has_entry(options, "herdgraph.read_ahead") ? mapped : in_memory)
    if (ort::Status* failed = api.add_operator(domain, each)) return failed;
  return api.add_domain(options, domain);
}

// The unit in use, for `herdgraph inspect` and tests.
extern "C" EXPORT const char* herdgraph_unit() { return herd::kernels().name; }

// Which graphs the operators understand (compile.py), for the loader.
extern "C" EXPORT int herdgraph_interface() { return INTERFACE; }
