/* A hollow NCCL: the functions that libnccl.py binds, on memory of the host that processes share through a file.

   "Device" pointers are the host's, and every exchange is over when its call returns; until then the call blocks, as a
   stream would. While a hollow CUDA runtime records a graph, exchanges become part of it. Sums are taken in the order of the ranks, 16-bit ones in float32. A call that waits
   for a rank that never comes ends only by ncclCommAbort, and counts that differ are never noticed but waited out, as by
   the real one.

   HOLLOW_NCCL_DIR      folder of the shared files, which are removed when all ranks have met
   HOLLOW_NCCL_VERSION  what ncclGetVersion says
   HOLLOW_NCCL_FAULT    AT:WHAT of this process, or AT:WHAT@RANK of that rank of any communicator: at its AT-th
                        exchange (0: when it meets the others) it does WHAT: stall, kill (itself), count (exchanges half as much), error (the call fails), lost (the others
                        are told that a rank is gone, which NCCL sees on a network) */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RANKS = 8, SLOT = 1 << 16 };
enum { SUCCESS = 0, CUDA_ERROR = 1, SYSTEM_ERROR = 2, INTERNAL_ERROR = 3, REMOTE_ERROR = 6 };
static const size_t ITEM[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
enum { FLOAT16 = 6, FLOAT32 = 7, BFLOAT16 = 9 };

typedef struct { char internal[128]; } ncclUniqueId;

typedef struct {
  atomic_int arrived, lost;
  struct { atomic_long posted, passed; size_t bytes; } rank[RANKS];
  struct { atomic_int full; size_t bytes; } box[RANKS][RANKS]; /* from, to */
  char slot[RANKS][SLOT], mail[RANKS][RANKS][SLOT];
} Shared;

typedef struct {
  Shared *shared;
  int rank, size;
  long step;
  atomic_int aborted;
} Comm;

static int exchanges;

static int wait_a_little(Comm *comm) {
  usleep(20);
  return atomic_load(&comm->aborted);
}
#define UNTIL(comm, condition) \
  while (!(condition)) \
    if (wait_a_little(comm)) return INTERNAL_ERROR

/* Do what HOLLOW_NCCL_FAULT says at this exchange. */
static int fault(Comm *comm, int at, size_t *bytes) {
  const char *text = getenv("HOLLOW_NCCL_FAULT");
  char what[16] = "";
  int when = -1, whose = comm->rank;
  if (!text || sscanf(text, "%d:%15[a-z]@%d", &when, what, &whose) < 2) return SUCCESS;
  if (when != at || whose != comm->rank) return SUCCESS;
  if (!strcmp(what, "kill")) raise(SIGKILL);
  if (!strcmp(what, "count")) *bytes /= 2;
  if (!strcmp(what, "lost")) atomic_store(&comm->shared->lost, 1);
  if (!strcmp(what, "stall") || !strcmp(what, "lost")) UNTIL(comm, 0);
  return strcmp(what, "error") ? SUCCESS : CUDA_ERROR;
}

static float widened(uint16_t value, int type) {
  if (type == FLOAT16) {
    _Float16 half;
    memcpy(&half, &value, 2);
    return (float)half;
  }
  uint32_t bits = (uint32_t)value << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

static uint16_t narrowed(float value, int type) {
  uint16_t narrow;
  if (type == FLOAT16) {
    _Float16 half = (_Float16)value;
    memcpy(&narrow, &half, 2);
    return narrow;
  }
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to nearest even */
}

static void sum(Comm *comm, void *result, size_t bytes, int type) {
  for (size_t i = 0; i < bytes / ITEM[type]; i++) {
    float total = 0;
    for (int r = 0; r < comm->size; r++) {
      const char *part = comm->shared->slot[r];
      total += type == FLOAT32 ? ((const float *)part)[i] : widened(((const uint16_t *)part)[i], type);
    }
    if (type == FLOAT32) ((float *)result)[i] = total;
    else ((uint16_t *)result)[i] = narrowed(total, type);
  }
}

/* Every rank puts a piece into its slot and waits for those of all others. */
static int post(Comm *comm, const char *value, size_t bytes) {
  Shared *shared = comm->shared;
  for (int r = 0; r < comm->size; r++) UNTIL(comm, atomic_load(&shared->rank[r].passed) >= comm->step);
  comm->step++;
  memcpy(shared->slot[comm->rank], value, bytes);
  shared->rank[comm->rank].bytes = bytes;
  atomic_store(&shared->rank[comm->rank].posted, comm->step);
  for (int r = 0; r < comm->size; r++) {
    UNTIL(comm, atomic_load(&shared->rank[r].posted) >= comm->step);
    UNTIL(comm, shared->rank[r].bytes == bytes); /* never, if it is not */
  }
  return SUCCESS;
}

static void pass(Comm *comm) { atomic_store(&comm->shared->rank[comm->rank].passed, comm->step); }

typedef struct Exchange Exchange;
struct Exchange {
  int (*run)(Exchange *);
  const void *value;
  void *result;
  size_t bytes;
  int type, peer;
  Comm *comm;
};

static int all_reduce(Exchange *x) {
  size_t bytes = x->bytes;
  int status = fault(x->comm, ++exchanges, &bytes);
  for (size_t at = 0; at < bytes && !status; at += SLOT) {
    size_t piece = bytes - at < SLOT ? bytes - at : SLOT;
    if ((status = post(x->comm, (const char *)x->value + at, piece))) break;
    sum(x->comm, (char *)x->result + at, piece, x->type);
    pass(x->comm);
  }
  return status;
}

static int all_gather(Exchange *x) {
  size_t bytes = x->bytes;
  int status = fault(x->comm, ++exchanges, &bytes);
  for (size_t at = 0; at < bytes && !status; at += SLOT) {
    size_t piece = bytes - at < SLOT ? bytes - at : SLOT;
    if ((status = post(x->comm, (const char *)x->value + at, piece))) break;
    for (int r = 0; r < x->comm->size; r++)
      memcpy((char *)x->result + r * x->bytes + at, x->comm->shared->slot[r], piece);
    pass(x->comm);
  }
  return status;
}

static int send_to(Exchange *x) {
  Shared *shared = x->comm->shared;
  size_t bytes = x->bytes;
  int status = fault(x->comm, ++exchanges, &bytes), me = x->comm->rank;
  for (size_t at = 0; at < bytes && !status; at += SLOT) {
    size_t piece = bytes - at < SLOT ? bytes - at : SLOT;
    memcpy(shared->mail[me][x->peer], (const char *)x->value + at, piece);
    shared->box[me][x->peer].bytes = piece;
    atomic_store(&shared->box[me][x->peer].full, 1);
    UNTIL(x->comm, !atomic_load(&shared->box[me][x->peer].full));
  }
  return status;
}

static int receive_from(Exchange *x) {
  Shared *shared = x->comm->shared;
  size_t bytes = x->bytes;
  int status = fault(x->comm, ++exchanges, &bytes), me = x->comm->rank;
  for (size_t at = 0; at < bytes && !status; at += SLOT) {
    size_t piece = bytes - at < SLOT ? bytes - at : SLOT;
    UNTIL(x->comm, atomic_load(&shared->box[x->peer][me].full) && shared->box[x->peer][me].bytes == piece);
    memcpy((char *)x->result + at, shared->mail[x->peer][me], piece);
    atomic_store(&shared->box[x->peer][me].full, 0);
  }
  return status;
}

static int run_later(void *data) {
  Exchange *exchange = data;
  return exchange->run(exchange);
}

/* At once; or, where a hollow CUDA runtime records a graph on the stream, whenever the graph runs. */
static int put(void *stream, Exchange exchange) {
  bool (*enqueue)(void *, int (*)(void *), void *) = dlsym(RTLD_DEFAULT, "hollow_enqueue");
  Exchange *kept = malloc(sizeof *kept);
  *kept = exchange;
  if (enqueue && enqueue(stream, run_later, kept)) return SUCCESS;
  free(kept);
  return exchange.run(&exchange);
}

int ncclAllReduce(const void *value, void *result, size_t count, int type, int op, Comm *comm, void *stream) {
  (void)op;
  return put(stream, (Exchange){all_reduce, value, result, count * ITEM[type], type, 0, comm});
}

int ncclAllGather(const void *value, void *result, size_t count, int type, Comm *comm, void *stream) {
  return put(stream, (Exchange){all_gather, value, result, count * ITEM[type], type, 0, comm});
}

int ncclSend(const void *value, size_t count, int type, int peer, Comm *comm, void *stream) {
  return put(stream, (Exchange){send_to, value, NULL, count * ITEM[type], type, peer, comm});
}

int ncclRecv(void *result, size_t count, int type, int peer, Comm *comm, void *stream) {
  return put(stream, (Exchange){receive_from, NULL, result, count * ITEM[type], type, peer, comm});
}

int ncclGroupStart(void) { return SUCCESS; }
int ncclGroupEnd(void) { return SUCCESS; }

int ncclGetVersion(int *version) {
  const char *text = getenv("HOLLOW_NCCL_VERSION");
  *version = text ? atoi(text) : 23203;
  return SUCCESS;
}

int ncclGetUniqueId(ncclUniqueId *id) {
  static int made;
  const char *folder = getenv("HOLLOW_NCCL_DIR");
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "%s/nccl.%d.%d", folder ? folder : "/dev/shm", getpid(), made++);
  int file = open(id->internal, O_RDWR | O_CREAT | O_EXCL, 0600);
  int failed = file < 0 || ftruncate(file, sizeof(Shared));
  if (file >= 0) close(file);
  return failed ? SYSTEM_ERROR : SUCCESS;
}

int ncclCommInitRank(Comm **made, int size, ncclUniqueId id, int rank) {
  int file = open(id.internal, O_RDWR);
  if (file < 0 || size > RANKS) return SYSTEM_ERROR;
  Comm *comm = calloc(1, sizeof *comm);
  comm->rank = rank, comm->size = size;
  comm->shared = mmap(NULL, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  int status = fault(comm, 0, &(size_t){0});
  if (status) return status;
  if (atomic_fetch_add(&comm->shared->arrived, 1) + 1 == size) unlink(id.internal);
  UNTIL(comm, atomic_load(&comm->shared->arrived) == size);
  *made = comm;
  return SUCCESS;
}

/* What a blocked call still looks at stays there. */
int ncclCommAbort(Comm *comm) {
  atomic_store(&comm->aborted, 1);
  return SUCCESS;
}

int ncclCommGetAsyncError(Comm *comm, int *error) {
  *error = atomic_load(&comm->shared->lost) ? REMOTE_ERROR : SUCCESS;
  return SUCCESS;
}

const char *ncclGetErrorString(int status) {
  static const char *words[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error",
                                "invalid argument", "invalid usage",
                                "remote process exited or there was a network error"};
  return status >= 0 && status < 7 ? words[status] : "unknown result code";
}

const char *ncclGetLastError(Comm *comm) {
  (void)comm;
  return "hollow";
}
