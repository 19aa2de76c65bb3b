// gather_tokens: copies the kept rows of every column. A row is read once and written once.
#include <algorithm>
#include <cstring>

#include "../launchers.h"
#include "threads.h"

namespace minifocus::cpu {

constexpr int64_t kGrainBytes = 1 << 18;  // another thread does not pay for less

int gather_tokens(const GatherArgs& args, void*) {
  for (int i = 0; i < args.num_columns; ++i) {
    const GatherArgs::Column& column = args.columns[i];
    const int64_t bytes = column.row_bytes;
    if (bytes == 0) continue;
    const char* from = static_cast<const char*>(column.from);
    char* to = static_cast<char*>(column.to);
    parallel_for(args.count, std::max<int64_t>(1, kGrainBytes / bytes), [=, &args](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t source = args.index[row];
        if (source < 0) {
          std::memset(to + row * bytes, 0, bytes);
        } else {
          std::memcpy(to + row * bytes, from + source * bytes, bytes);
        }
      }
    });
  }
  return 0;
}

}  // namespace minifocus::cpu
