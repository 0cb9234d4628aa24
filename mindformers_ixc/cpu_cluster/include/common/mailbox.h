// Messages between the ranks of one job: a file each, in a folder that no other job uses.
//
// A message is written beside its final name and renamed, so whoever finds it finds all of
// it; the reader removes it. Every rank holds a lock on a file of its own, `rank.N`, for as
// long as it lives. The operating system drops that lock however the process ends, so a
// waiting rank can ask whether another still lives, and neither a process id in use again
// nor a zombie deceives it. A rank that ends in good order writes that into its file first.
#ifndef MINDFORMERS_IXC_CPU_MAILBOX_H_
#define MINDFORMERS_IXC_CPU_MAILBOX_H_
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cctype>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>
#include "ir/dtype.h"
#include "utils/log_adapter.h"

namespace mindspore::cpu_parallel {
struct Job {
  std::string folder;  // empty until the rank has joined
  unsigned int rank{0};
  unsigned int size{0};
  double timeout_s{0};
};

inline Job &ThisJob() {
  static Job job;
  return job;
}

// 1: a living process other than this one holds the lock on the file, or that cannot be known; 0: none does; -1: there
// is no file.
inline int HoldsLock(const std::string &path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT ? -1 : 1;
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  const bool held = fcntl(fd, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
  close(fd);  // would drop this process's own lock on the file; nobody asks about itself
  return held ? 1 : 0;
}

class Peer {
 public:
  explicit Peer(unsigned int rank) : rank_(rank), path_(ThisJob().folder + "/rank." + std::to_string(rank)) {}

  bool Lives() const { return rank_ == ThisJob().rank || HoldsLock(path_) == 1; }
  // "rank 1 (process 4711) died"
  std::string Fate() const {
    const std::string text = Text();
    if (text.empty()) return "rank " + std::to_string(rank_) + "'s file " + path_ + " is gone: the mailbox was removed";
    return Name() + (EndedWell() ? " has ended" : " died");
  }
  bool Died() const { return !Lives() && !Text().empty() && !EndedWell(); }
  std::string Name() const {
    const std::string text = Text();
    return "rank " + std::to_string(rank_) + " (process " + text.substr(0, text.find_first_of(" \n")) + ")";
  }

 private:
  bool EndedWell() const { return Text().find("ended") != std::string::npos; }
  std::string Text() const {
    if (rank_ == ThisJob().rank) return std::to_string(getpid());
    char text[64];
    const int fd = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    const ssize_t size = fd < 0 ? 0 : read(fd, text, sizeof(text));
    if (fd >= 0) close(fd);
    return size > 0 ? std::string(text, static_cast<size_t>(size)) : std::string();
  }
  unsigned int rank_;
  std::string path_;
};

// What stands before the buffer in a message's file: enough to tell a damaged message from a rank that does
// something else than its peer.
struct Header {
  char magic[8];
  uint64_t channel;   // hash of its name
  uint64_t sequence;  // of the message in its channel
  int64_t type;       // TypeId of the elements
  uint64_t size;      // of the buffer, in bytes
  uint64_t checksum;  // of the buffer
};
constexpr char kMagic[8] = {'c', 'p', 'u', ' ', 'm', 's', 'g', '1'};

inline uint64_t Hash(const void *data, size_t size) {
  constexpr uint64_t kPrime = 0x9E3779B97F4A7C15;
  const char *bytes = static_cast<const char *>(data);
  uint64_t hash = size, word = 0;
  for (; size >= sizeof(word); bytes += sizeof(word), size -= sizeof(word)) {
    std::memcpy(&word, bytes, sizeof(word));
    hash = ((hash ^ word) * kPrime) ^ (hash >> 32);
  }
  word = 0;
  std::memcpy(&word, bytes, size);
  return ((hash ^ word) * kPrime) ^ (hash >> 32);
}

// One message: the `sequence`th from one rank to another on a channel.
struct Message {
  std::string channel;
  unsigned int from, to;
  uint64_t sequence;
  std::string path;

  // Names of groups may be long or have slashes in them; the hash keeps shortened ones apart.
  Message(const std::string &name, unsigned int sender, unsigned int receiver)
      : channel(name), from(sender), to(receiver), sequence(Count(name, sender, receiver)) {
    std::string readable = name.substr(0, 100);
    for (char &c : readable) {
      if (!std::isalnum(static_cast<unsigned char>(c)) && c != '_' && c != '-' && c != '.') c = '_';
    }
    std::ostringstream text;
    text << ThisJob().folder << "/" << readable << "." << std::hex << ChannelHash() << std::dec << "." << from << "-"
         << to << "." << sequence;
    path = text.str();
  }
  uint64_t ChannelHash() const { return Hash(channel.data(), channel.size()); }
  Header MakeHeader(TypeId type, const void *data, size_t size) const {
    Header header{};
    std::memcpy(header.magic, kMagic, sizeof(kMagic));
    header.channel = ChannelHash();
    header.sequence = sequence;
    header.type = static_cast<int64_t>(type);
    header.size = size;
    header.checksum = Hash(data, size);
    return header;
  }

 private:
  static uint64_t Count(const std::string &channel, unsigned int from, unsigned int to) {
    static std::mutex mutex;
    static std::map<std::pair<std::string, std::pair<unsigned int, unsigned int>>, uint64_t> sequence;
    std::lock_guard<std::mutex> lock(mutex);
    return sequence[{channel, {from, to}}]++;
  }
};

class Mailbox {
 public:
  static void Put(const std::string &channel, unsigned int to, TypeId type, const void *data, size_t size) {
    CheckJoined();
    const Message message(channel, ThisJob().rank, to);
    const Peer peer(to);
    if (!peer.Lives()) {
      MS_LOG(EXCEPTION) << "Rank " << message.from << " cannot send message " << message.sequence << " on channel "
                        << channel << ": " << peer.Fate() << ".";
    }
    const Header header = message.MakeHeader(type, data, size);
    const std::string partial = message.path + ".part";
    const int fd = open(partial.c_str(), O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC, 0600);
    const bool written = fd >= 0 && WriteAll(fd, &header, sizeof(header)) && WriteAll(fd, data, size);
    const int cause = errno;
    if (fd >= 0) close(fd);
    if (written && rename(partial.c_str(), message.path.c_str()) == 0) return;
    const int reason = written ? errno : cause;
    unlink(partial.c_str());
    MS_LOG(EXCEPTION) << "Rank " << message.from << " cannot leave a message of " << size << " bytes for rank " << to
                      << " in the mailbox " << ThisJob().folder << ": " << std::strerror(reason)
                      << ". CPU_PARALLEL_MAILBOX must name a folder that can be written and has room.";
  }

  static void Take(const std::string &channel, unsigned int from, TypeId type, void *data, size_t size) {
    CheckJoined();
    const Message message(channel, from, ThisJob().rank);
    const int fd = WaitFor(message);
    const std::string fault = Read(fd, message, type, data, size);
    close(fd);
    if (!fault.empty()) MS_LOG(EXCEPTION) << fault;
    unlink(message.path.c_str());
  }

 private:
  static void CheckJoined() {
    if (ThisJob().folder.empty()) {
      MS_LOG(EXCEPTION) << "This process has no mailbox: mindformers_ixc.cpu_cluster.install() has not been called.";
    }
  }

  // Opens a message as soon as it is there.
  static int WaitFor(const Message &message) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    auto next_look = start;
    while (true) {
      const auto now = Clock::now();
      const double waited_s = std::chrono::duration<double>(now - start).count();
      const bool look = now >= next_look;
      // asked before the file is opened: a rank may have left its last message and ended since
      const std::string loss = look ? Loss(message, waited_s) : std::string();
      const int fd = open(message.path.c_str(), O_RDONLY | O_CLOEXEC);
      if (fd >= 0) return fd;
      if (!loss.empty()) {
        MS_LOG(EXCEPTION) << Waiting(message) << ", but " << loss << " The log of the rank that ended first says why.";
      }
      if (waited_s > ThisJob().timeout_s) {
        MS_LOG(EXCEPTION) << Waiting(message) << " for " << ThisJob().timeout_s << " s; " << Peer(message.from).Name()
                          << " still runs, stuck or doing something else. Its log may say why; a larger "
                          << "CPU_PARALLEL_TIMEOUT_S waits longer.";
      }
      if (look) next_look = now + std::chrono::milliseconds(500);
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }

  static std::string Waiting(const Message &message) {
    std::ostringstream text;
    text << "Rank " << message.to << " waited for message " << message.sequence << " of rank " << message.from
         << " on channel " << message.channel;
    return text.str();
  }

  // Why a message will not come; empty as long as it may.
  static std::string Loss(const Message &message, double waited_s) {
    const Peer peer(message.from);
    const std::string others = Deaths(message.from);
    if (!peer.Lives()) {
      return peer.Fate() + " without sending it." + (others.empty() ? "" : " Dead as well: " + others + ".");
    }
    // The sender may itself wait for the dead rank, and not raise or not end. It may also need nothing of it any more:
    // then it sends soon.
    constexpr double kPatience_s = 2;
    return others.empty() || waited_s < kPatience_s ? "" : others + " died, and the job cannot go on without it.";
  }

  // "rank 2 (process 4712) and rank 3 (process 4713)"
  static std::string Deaths(unsigned int besides) {
    std::string names;
    for (unsigned int rank = 0; rank < ThisJob().size; ++rank) {
      const Peer peer(rank);
      if (rank != besides && peer.Died()) names += (names.empty() ? "" : " and ") + peer.Name();
    }
    return names;
  }

  // Fills the buffer; returns what is wrong with the message, or nothing.
  static std::string Read(int fd, const Message &message, TypeId type, void *data, size_t size) {
    std::ostringstream fault;
    struct stat status {};
    Header header{};
    const Header expected = message.MakeHeader(type, data, 0);
    const bool has_head = fstat(fd, &status) == 0 && ReadAll(fd, &header, sizeof(header));
    if (has_head && std::memcmp(&header, &expected, offsetof(Header, type)) != 0) {
      fault << Damaged(message) << " it does not begin as this message.";
    } else if (!has_head || static_cast<uint64_t>(status.st_size) != sizeof(header) + header.size) {
      fault << Damaged(message) << " it has " << status.st_size << " bytes, where "
            << sizeof(header) + (has_head ? header.size : size) << " were expected.";
    } else if (header.size != size || header.type != expected.type) {
      fault << "Rank " << message.from << " sent " << header.size << " bytes of "
            << TypeIdToString(static_cast<TypeId>(header.type)) << " on channel " << message.channel << ", where rank "
            << message.to << " expects " << size << " bytes of " << TypeIdToString(type)
            << ": the ranks do not run the same graph, or call its operators in different order.";
    } else if (!ReadAll(fd, data, size) || Hash(data, size) != header.checksum) {
      fault << Damaged(message) << " its checksum is not that of its content.";
    }
    return fault.str();
  }

  static std::string Damaged(const Message &message) {
    return "The message " + message.path + " from rank " + std::to_string(message.from) + " to rank " +
           std::to_string(message.to) +
           " is damaged, and something else than these ranks must have written into the mailbox:";
  }

  static bool WriteAll(int fd, const void *data, size_t size) {
    for (size_t done = 0; done < size;) {
      const ssize_t n = write(fd, static_cast<const char *>(data) + done, size - done);
      if (n < 0 && errno != EINTR) return false;
      done += n > 0 ? static_cast<size_t>(n) : 0;
    }
    return true;
  }

  static bool ReadAll(int fd, void *data, size_t size) {
    for (size_t done = 0; done < size;) {
      const ssize_t n = read(fd, static_cast<char *>(data) + done, size - done);
      if (n == 0 || (n < 0 && errno != EINTR)) return false;
      done += n > 0 ? static_cast<size_t>(n) : 0;
    }
    return true;
  }
};
}  // namespace mindspore::cpu_parallel
#endif  // MINDFORMERS_IXC_CPU_MAILBOX_H_
