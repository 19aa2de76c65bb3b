// An exported package: its manifest, its weights, mapped once, and its parts (minifocus/export/parts.py).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "manifest.h"

namespace minifocus {

// A compiled function of weights and inputs.
class Part {
 public:
  Part(const std::string& library, std::vector<std::string> weights, int workers);

  // The weights' names, which come first among the inputs.
  const std::vector<std::string>& weights() const { return weights_; }
  // Threads may call it at once; more of them than workers wait for each other.
  std::vector<at::Tensor> operator()(std::vector<at::Tensor> weights, std::vector<at::Tensor> inputs) const;

 private:
  std::vector<std::string> weights_;
  std::unique_ptr<torch::inductor::AOTIModelContainerRunnerCpu> runner_;
};

class Package {
 public:
  // Checks versions, the processor, and the hashes of all files; those of the weights only if `check_weights`, since it reads
  // them all. Throws Error.
  Package(const std::filesystem::path& folder, int workers, bool check_weights);
  Package(const Package&) = delete;
  ~Package();

  const std::filesystem::path& folder() const { return folder_; }
  const Manifest& manifest() const { return manifest_; }
  bool has_part(const std::string& name) const { return parts_.contains(name); }
  const Part& part(const std::string& name) const;
  at::Tensor weight(const std::string& name) const;
  // Those that a part takes, their names behind `prefix`.
  std::vector<at::Tensor> weights_of(const std::string& part, const std::string& prefix) const;

 private:
  void map_weights();

  std::filesystem::path folder_;
  Manifest manifest_;
  void* mapped_ = nullptr;
  size_t mapped_size_ = 0;
  std::map<std::string, at::Tensor> weights_;
  std::map<std::string, Part> parts_;
};

}  // namespace minifocus
