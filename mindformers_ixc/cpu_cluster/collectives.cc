// CPU kernels for the communication operators that MindSpore's CPU back end lacks
// or restricts (Send, Receive, ReduceScatter; AllReduce other than sum; groups other
// than the world): every rank leaves its buffer in the mailbox of the rank's peers and
// picks up theirs. Slow and simple, for tests only.
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>
#include "common/mailbox.h"
#include "common/reduction.h"
#include "kernel/cpu/cpu_kernel.h"

namespace mindspore::cpu_parallel {
struct Group {
  std::vector<unsigned int> ranks;  // global ranks, in group order
  unsigned int self;                // position of this rank in it
  std::string channel;              // one for all names of the same group
};
// graphs are compiled, and groups with them, while others may run
std::mutex g_groups_mutex;
std::map<std::string, Group> g_groups;

void AddGroup(const std::string &name, const std::string &channel, const std::vector<unsigned int> &ranks) {
  Group group{ranks, 0, channel};
  for (unsigned int i = 0; i < ranks.size(); ++i) {
    if (ranks[i] == ThisJob().rank) group.self = i;
  }
  std::lock_guard<std::mutex> lock(g_groups_mutex);
  g_groups[name] = group;
}

Group FindGroup(const std::string &name) {
  std::lock_guard<std::mutex> lock(g_groups_mutex);
  auto it = g_groups.find(name);
  if (it == g_groups.end()) {
    MS_LOG(EXCEPTION) << "The communication group " << name << " is not known to the CPU's collectives; create it after "
                      << "mindformers_ixc.cpu_cluster.install().";
  }
  return it->second;
}

class CommKernel : public kernel::NativeCpuKernelMod {
 public:
  bool Init(const std::vector<kernel::KernelTensor *> &, const std::vector<kernel::KernelTensor *> &) override {
    group_name_ = GetValue<std::string>(primitive_->GetAttr("group"));
    if (primitive_->HasAttr("op")) {
      const auto name = GetValue<std::string>(primitive_->GetAttr("op"));
      if (!ParseReduce(name, &reduce_)) {
        MS_LOG(EXCEPTION) << primitive_->name() << " on the CPU reduces by sum, max, min or prod, not by " << name << ".";
      }
    }
    return true;
  }
  int Resize(const std::vector<kernel::KernelTensor *> &in, const std::vector<kernel::KernelTensor *> &out) override {
    return kernel::KernelMod::Resize(in, out);
  }
  // Any types: MindSpore's primitives have checked them, and most kernels here move bytes.
  std::vector<kernel::KernelAttr> GetOpSupport() override {
    return {kernel::KernelAttr().AddSkipCheckAttr(true)};
  }
  bool Launch(const std::vector<kernel::KernelTensor *> &in, const std::vector<kernel::KernelTensor *> &,
              const std::vector<kernel::KernelTensor *> &out) override {
    Run(in, out);
    return true;
  }

 protected:
  virtual void Run(const std::vector<kernel::KernelTensor *> &in, const std::vector<kernel::KernelTensor *> &out) = 0;
  Group group() const { return FindGroup(group_name_); }
  std::string Channel(const std::string &kind) const { return kind + "." + group().channel; }
  // The peer at a place of the group, of Send and Receive.
  unsigned int Member(const std::string &attribute) const {
    const auto place = GetValue<int64_t>(primitive_->GetAttr(attribute));
    const Group g = group();
    if (place < 0 || static_cast<size_t>(place) >= g.ranks.size()) {
      MS_LOG(EXCEPTION) << primitive_->name() << " names place " << place << " of the group " << group_name_
                        << ", which has " << g.ranks.size() << " ranks.";
    }
    return g.ranks[static_cast<size_t>(place)];
  }
  // Every rank's buffer, in group order (own one included), handed to `use`.
  template <typename Use>
  void Exchange(const std::string &kind, TypeId type, const void *data, size_t size, Use use) const {
    const Group g = group();
    const std::string channel = Channel(kind);
    for (unsigned int peer : g.ranks) {
      if (peer != ThisJob().rank) Mailbox::Put(channel, peer, type, data, size);
    }
    std::vector<char> buffer(size);
    for (unsigned int i = 0; i < g.ranks.size(); ++i) {
      if (g.ranks[i] == ThisJob().rank) {
        use(i, data);
      } else {
        Mailbox::Take(channel, g.ranks[i], type, buffer.data(), size);
        use(i, buffer.data());
      }
    }
  }
  // The reduction of all ranks' buffers. A type without it is refused before anything is sent.
  std::unique_ptr<Reducer> ReduceAll(const std::string &kind, const kernel::KernelTensor *tensor) const {
    auto reducer = MakeReducer(tensor->dtype_id(), reduce_, tensor->size());
    if (reducer == nullptr) {
      MS_LOG(EXCEPTION) << primitive_->name() << " on the CPU has no such reduction of "
                        << TypeIdToString(tensor->dtype_id()) << "; convert the tensor to float32 before it.";
    }
    Exchange(kind, tensor->dtype_id(), tensor->device_ptr(), tensor->size(),
             [&](unsigned int, const void *part) { reducer->Add(part); });
    return reducer;
  }
  std::string group_name_;
  Reduce reduce_{Reduce::kSum};
};

class AllReduceKernel : public CommKernel {
 protected:
  void Run(const std::vector<kernel::KernelTensor *> &in, const std::vector<kernel::KernelTensor *> &out) override {
    for (size_t k = 0; k < in.size() && k < out.size(); ++k) {
      ReduceAll("allreduce", in[k])->Store(out[k]->device_ptr());
    }
  }
};

class AllGatherKernel : public CommKernel {
 protected:
  void Run(const std::vector<kernel::KernelTensor *> &in, const std::vector<kernel::KernelTensor *> &out) override {
    const size_t size = in[0]->size();
    std::vector<char> total(size * group().ranks.size());  // the output may be the input's memory
    Exchange("allgather", in[0]->dtype_id(), in[0]->device_ptr(), size,
             [&](unsigned int i, const void *part) { std::memcpy(total.data() + i * size, part, size); });
    CheckSize(out[0]->size(), total.size());
    std::memcpy(out[0]->device_ptr(), total.data(), total.size());
  }

 private:
  void CheckSize(size_t found, size_t expected) const {
    if (found == expected) return;
    MS_LOG(EXCEPTION) << "AllGather's output in the group " << group_name_ << " has room for " << found
                      << " bytes, and the ranks' parts have " << expected << ".";
  }
};

class ReduceScatterKernel : public CommKernel {
 protected:
  void Run(const std::vector<kernel::KernelTensor *> &in, const std::vector<kernel::KernelTensor *> &out) override {
    std::vector<char> total(in[0]->size());
    ReduceAll("reducescatter", in[0])->Store(total.data());
    std::memcpy(out[0]->device_ptr(), total.data() + group().self * out[0]->size(), out[0]->size());
  }
};

class SendKernel : public CommKernel {
 protected:
  void Run(const std::vector<kernel::KernelTensor *> &in, const std::vector<kernel::KernelTensor *> &) override {
    const auto tag = GetValue<int64_t>(primitive_->GetAttr("sr_tag"));
    Mailbox::Put(Channel("p2p" + std::to_string(tag)), Member("dest_rank"), in[0]->dtype_id(), in[0]->device_ptr(),
                 in[0]->size());
  }
};

class ReceiveKernel : public CommKernel {
 protected:
  void Run(const std::vector<kernel::KernelTensor *> &, const std::vector<kernel::KernelTensor *> &out) override {
    const auto tag = GetValue<int64_t>(primitive_->GetAttr("sr_tag"));
    Mailbox::Take(Channel("p2p" + std::to_string(tag)), Member("src_rank"), out[0]->dtype_id(), out[0]->device_ptr(),
                  out[0]->size());
  }
};

class BarrierKernel : public CommKernel {
 protected:
  void Run(const std::vector<kernel::KernelTensor *> &, const std::vector<kernel::KernelTensor *> &) override {
    const char token = 0;
    Exchange("barrier", kNumberTypeInt8, &token, sizeof(token), [](unsigned int, const void *) {});
  }
};

template <typename Kernel>
void Replace(const std::string &name) {
  auto &factory = kernel::Factory<kernel::NativeCpuKernelMod>::Instance();
  factory.UnRegister(name);
  factory.Register(name, []() { return std::make_shared<Kernel>(); });
}
}  // namespace mindspore::cpu_parallel

// `folder` belongs to this job, and every rank holds the lock on its file there.
extern "C" void register_cpu_collectives(unsigned int rank, unsigned int size, const char *folder, double timeout_s) {
  using namespace mindspore::cpu_parallel;
  ThisJob() = {folder, rank, size, timeout_s};
  Replace<AllReduceKernel>("AllReduce");
  Replace<AllGatherKernel>("AllGather");
  Replace<ReduceScatterKernel>("ReduceScatter");
  Replace<SendKernel>("Send");
  Replace<ReceiveKernel>("Receive");
  Replace<BarrierKernel>("Barrier");
}

extern "C" void add_cpu_group(const char *name, const char *channel, const unsigned int *ranks, int size) {
  mindspore::cpu_parallel::AddGroup(name, channel, std::vector<unsigned int>(ranks, ranks + size));
}

extern "C" int cpu_rank_holds_lock(const char *path) { return mindspore::cpu_parallel::HoldsLock(path); }

// The reduction alone, without ranks: MindSpore's primitives let only some of the types through.
extern "C" bool reduce_cpu_buffers(int type, const char *op, const void *const *parts, int count, void *out,
                                   size_t bytes) {
  using namespace mindspore::cpu_parallel;
  Reduce reduce;
  if (!ParseReduce(op, &reduce)) return false;
  auto reducer = MakeReducer(static_cast<mindspore::TypeId>(type), reduce, bytes);
  if (reducer == nullptr) return false;
  for (int i = 0; i < count; ++i) reducer->Add(parts[i]);
  reducer->Store(out);
  return true;
}
