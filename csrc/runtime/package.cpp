#include "package.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/hash.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/csrc/api/include/torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <mutex>

#include "error.h"
#include "operators.h"

namespace minifocus {
namespace {

constexpr int64_t kFormat = 1;  // minifocus/export/package.py writes the same

const std::map<std::string, at::ScalarType> kDtypes = {
    {"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf},
    {"int8", at::kChar},     {"uint8", at::kByte},
};

std::string read_file(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  expect(stream.is_open(), file.string(), ": expected a file of the package, found none that can be read");
  return std::string(std::istreambuf_iterator<char>(stream), {});
}

void check_hash(const std::filesystem::path& file, const std::string& expected) {
  const std::string found = c10::sha1(read_file(file)).str();
  expect(found == expected, file.string(), ": expected the file that was exported, with SHA-1 ", expected, ", found ", found);
}

// The manifest's last line is the hash of those before it.
void check_manifest(const std::filesystem::path& file) {
  const std::string content = read_file(file), key = "sha1.manifest ";
  const size_t last = content.size() < 2 ? 0 : content.rfind('\n', content.size() - 2) + 1;
  const std::string expected = key + c10::sha1(content.substr(0, last)).str() + "\n";
  expect(content.substr(last) == expected, file.string(), ": expected the lines that were exported, with ", expected.substr(0, 54),
         " at the end, found other ones: the file was changed or cut off");
}

void need_operators() {
  static std::once_flag once;
  std::call_once(once, [] {
    if (!c10::Dispatcher::singleton().findSchema({"minifocus::select_top_p", ""})) register_operators();
  });
}

// Instructions that the processor lacks would end the process.
bool processor_has(const std::string& level) {
#if defined(__x86_64__)
  if (level == "x86-64-v4") return __builtin_cpu_supports("x86-64-v4");
  return level == "x86-64-v3" && __builtin_cpu_supports("x86-64-v3");
#elif defined(__aarch64__)
  return level == "aarch64";
#else
  return false;
#endif
}

}  // namespace

Part::Part(const std::string& library, std::vector<std::string> weights, int workers)
    : weights_(std::move(weights)), runner_(new torch::inductor::AOTIModelContainerRunnerCpu(library, workers)) {}

std::vector<at::Tensor> Part::operator()(std::vector<at::Tensor> weights, std::vector<at::Tensor> inputs) const {
  weights.insert(weights.end(), std::make_move_iterator(inputs.begin()), std::make_move_iterator(inputs.end()));
  return runner_->boxed_run(std::move(weights));
}

Package::Package(const std::filesystem::path& folder, int workers, bool check_weights)
    : folder_(folder), manifest_(Manifest::read(folder / "manifest.txt")) {
  check_manifest(manifest_.file());
  const int64_t format = manifest_.integer("format");
  expect(format == kFormat, folder.string(), ": expected a package of format ", kFormat, ", found ", format,
         ": export it again with this version of minifocus");
  // A part calls torch's functions by their layout in memory, which no other version promises to have.
  const std::string& torch = manifest_.word("torch");
  const auto release = [](const std::string& version) { return version.substr(0, version.find('+')); };
  expect(release(torch) == release(TORCH_VERSION), folder.string(), ": expected a package of torch ", TORCH_VERSION,
         ", found one of torch ", torch, ": export it again with that version");
  const std::string& cpu = manifest_.word("cpu");
  expect(processor_has(cpu), folder.string(), ": expected a processor of the level ", cpu,
         ", for which it was exported: export it again with another --cpu");
  need_operators();
  for (const std::string& file : manifest_.words("files")) check_hash(folder / file, manifest_.word("sha1." + file));
  map_weights();
  if (check_weights) check_hash(folder / "weights.bin", manifest_.word("sha1.weights.bin"));
  for (const std::string& name : manifest_.words("parts")) {
    const auto library = folder / "parts" / (name + ".so");
    try {
      parts_.try_emplace(name, library.string(), manifest_.words("part." + name), workers);
    } catch (const c10::Error& error) {
      fail(library.string(), ": not a part that can be loaded: ", error.what_without_backtrace());
    }
  }
}

Package::~Package() {
  parts_.clear();
  weights_.clear();
  if (mapped_ != nullptr) munmap(mapped_, mapped_size_);
}

void Package::map_weights() {
  const auto file = folder_ / "weights.bin";
  const int handle = open(file.c_str(), O_RDONLY | O_CLOEXEC);
  expect(handle >= 0, file.string(), ": expected a file of the package, found none that can be read");
  struct stat about {};
  const bool known = fstat(handle, &about) == 0 && S_ISREG(about.st_mode);
  const int64_t size = manifest_.integer("weights.size");
  void* mapped = MAP_FAILED;
  if (known && about.st_size == size && size > 0) mapped = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, handle, 0);
  close(handle);
  expect(known && about.st_size == size && size > 0, file.string(), ": expected ", size, " bytes, found ",
         known ? about.st_size : 0);
  expect(mapped != MAP_FAILED, file.string(), ": could not be mapped into memory");
  mapped_ = mapped, mapped_size_ = size;
  for (const std::string& name : manifest_.words("weights")) {
    const auto& words = manifest_.words("weight." + name);
    const auto dtype = words.empty() ? kDtypes.end() : kDtypes.find(words.front());
    expect(words.size() >= 2 && dtype != kDtypes.end(), folder_.string(), "/manifest.txt: weight.", name,
           ": expected a dtype, a place and a shape");
    std::vector<int64_t> numbers = manifest_.integers("weight." + name, 1);
    const int64_t begin = numbers.front();
    const std::vector<int64_t> shape(numbers.begin() + 1, numbers.end());
    __int128 bytes = at::elementSize(dtype->second);
    for (const int64_t length : shape) {
      expect(length >= 0, folder_.string(), "/manifest.txt: weight.", name, ": expected lengths of at least 0, got ", length);
      bytes = std::min<__int128>(bytes * length, __int128{1} << 100);
    }
    expect(begin >= 0 && begin % 64 == 0 && begin + bytes <= size, folder_.string(), "/manifest.txt: weight.", name,
           ": expected a place at a multiple of 64 within the ", size, " bytes of weights.bin, got ", begin);
    weights_.emplace(name, at::from_blob(static_cast<char*>(mapped_) + begin, shape, dtype->second));
  }
}

const Part& Package::part(const std::string& name) const {
  const auto found = parts_.find(name);
  if (found == parts_.end()) fail(folder_.string(), ": has no part ", name);
  return found->second;
}

at::Tensor Package::weight(const std::string& name) const {
  const auto found = weights_.find(name);
  if (found == weights_.end()) fail(folder_.string(), "/manifest.txt: weight.", name, ": no such key");
  return found->second;
}

std::vector<at::Tensor> Package::weights_of(const std::string& part, const std::string& prefix) const {
  std::vector<at::Tensor> found;
  for (const std::string& name : this->part(part).weights()) found.push_back(weight(prefix + name));
  return found;
}

}  // namespace minifocus
