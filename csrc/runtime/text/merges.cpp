#include "merges.h"

#include <algorithm>
#include <queue>

namespace minifocus {
namespace {

struct Candidate {
  uint32_t rank, at, result;  // `at`: the left symbol's index

  bool operator<(const Candidate& other) const {  // a priority queue hands out the largest
    return rank != other.rank ? rank > other.rank : at > other.at;
  }
};

}  // namespace

Merges::Merges(std::vector<Merge> merges, size_t num_tokens) : merges_(std::move(merges)), first_(num_tokens + 1) {
  for (const Merge& merge : merges_) ++first_[merge.left + 1];
  for (size_t i = 1; i < first_.size(); ++i) first_[i] += first_[i - 1];
}

const Merge* Merges::find(int64_t left, int64_t right) const {
  if (left == kNoToken || right == kNoToken) return nullptr;
  const Merge* end = merges_.data() + first_[left + 1];
  const Merge* found = std::lower_bound(merges_.data() + first_[left], end, right,
                                        [](const Merge& merge, int64_t id) { return merge.right < id; });
  return found != end && found->right == right ? found : nullptr;
}

void Merges::apply(std::vector<Symbol>& symbols) const {
  const uint32_t size = symbols.size();
  // A list of those that are left; `size` stands for none.
  std::vector<uint32_t> previous(size), next(size);
  std::vector<Candidate> begin;
  const auto consider = [&](uint32_t left, uint32_t right, auto&& add) {
    if (const Merge* merge = find(symbols[left].id, symbols[right].id))
      add(Candidate{merge->rank, left, merge->result});
  };
  for (uint32_t i = 0; i < size; ++i) {
    previous[i] = i == 0 ? size : i - 1;
    next[i] = i + 1;
    if (i > 0) consider(i - 1, i, [&](const Candidate& candidate) { begin.push_back(candidate); });
  }

  std::priority_queue<Candidate> queue({}, std::move(begin));
  const auto push = [&](const Candidate& candidate) { queue.push(candidate); };
  while (!queue.empty()) {
    const auto [rank, at, result] = queue.top();
    queue.pop();
    if (symbols[at].bytes == 0 || next[at] == size) continue;
    // It may have got another neighbour since.
    const uint32_t gone = next[at];
    const Merge* merge = find(symbols[at].id, symbols[gone].id);
    if (merge == nullptr || merge->result != result) continue;
    symbols[at] = {result, symbols[at].bytes + symbols[gone].bytes};
    symbols[gone].bytes = 0;
    next[at] = next[gone];
    if (next[at] != size) {
      previous[next[at]] = at;
      consider(at, next[at], push);
    }
    if (previous[at] != size) consider(previous[at], at, push);
  }
  std::erase_if(symbols, [](const Symbol& symbol) { return symbol.bytes == 0; });
}

}  // namespace minifocus
