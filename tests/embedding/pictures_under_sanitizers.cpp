// A program to be built with the sanitizers: makes tiles of each picture file that is named, by the manifest that is named first,
// and prints a line for each: height, width and checksums, or the error. With the one argument "planted" it reads beyond the end
// of an array, to show that they look.
#include <zlib.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "../../csrc/runtime/error.h"
#include "../../csrc/runtime/pictures/decode.h"
#include "../../csrc/runtime/pictures/tiles.h"

using namespace minifocus;

namespace {

template <class Value>
unsigned long checksum(const std::vector<Value>& values) {
  return crc32(0, reinterpret_cast<const Bytef*>(values.data()), static_cast<uInt>(values.size() * sizeof(Value)));
}

void print_tiles(const PictureSettings& settings, const char* path) {
  std::ifstream stream(path, std::ios::binary);
  // As long as the file is and no longer, so that one byte beyond its end is beyond the array's.
  std::vector<uint8_t> file{std::istreambuf_iterator<char>(stream), {}};
  file.shrink_to_fit();
  try {
    const Picture picture = decode_picture(file, path);
    const Tiles tiles = make_tiles(picture, settings);
    std::printf("%d %d %lu %lu\n", int(picture.height), int(picture.width), checksum(picture.rgb),
                checksum(tiles.values));
  } catch (const Error& error) {
    std::printf("%s\n", error.what());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "planted") {
    const std::vector<uint8_t> file(argc);
    return const_cast<const volatile uint8_t*>(file.data())[argc];
  }
  const PictureSettings settings = PictureSettings::from(Manifest::read(argv[1]));
  for (int i = 2; i < argc; ++i) print_tiles(settings, argv[i]);
}
