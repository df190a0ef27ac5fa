// Memory that a call needs while it runs. Kernels are shared by concurrent calls and items run on the session's threads,
// so nothing here belongs to a kernel or to a thread: a few blocks wait in slots, and whoever finds none allocates.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

namespace herd {

class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    bytes += 64;
    for (Block*& slot : slots()) {
      Block* found = __atomic_exchange_n(&slot, nullptr, __ATOMIC_ACQ_REL);
      if (found && found->size >= bytes) {
        block_ = found;
        break;
      }
      free(found);
    }
    if (!block_) {
      size_t size = bytes + bytes / 4;
      block_ = static_cast<Block*>(malloc(sizeof(Block) + size));
      if (!block_) abort();   // a model that fits leaves room for its activations
      block_->size = size;
    }
    next_ = (reinterpret_cast<uintptr_t>(block_ + 1) + 63) / 64 * 64;
  }
  ~Scratch() {
    for (Block*& slot : slots()) {
      block_ = __atomic_exchange_n(&slot, block_, __ATOMIC_ACQ_REL);
      if (!block_) return;
    }
    free(block_);
  }
  Scratch(const Scratch&) = delete;

  // Uninitialised; `bytes` of the constructor is a sum of needs().
  template <class T> T* take(size_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += needs<T>(count);
    return taken;
  }
  template <class T> static size_t needs(size_t count) { return (count * sizeof(T) + 63) / 64 * 64; }

 private:
  struct Block { size_t size; };
  using Slots = Block*[8];
  static Slots& slots() {
    static Slots all = {};
    return all;
  }
  Block* block_ = nullptr;
  uintptr_t next_;
};

}  // namespace herd
