// The picture part of csrc/runtime as functions that ctypes can call. A function that returns false has left an Error's message;
// what it made otherwise is kept until the next call, and copied out by take_picture or take_tiles.
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>

#include "../../csrc/runtime/anyres.h"
#include "../../csrc/runtime/error.h"
#include "../../csrc/runtime/manifest.h"
#include "../../csrc/runtime/pictures/decode.h"
#include "../../csrc/runtime/pictures/resize.h"
#include "../../csrc/runtime/pictures/tiles.h"

using namespace minifocus;

namespace {

std::string message;
Picture picture;
Tiles tiles;

template <class Calls>
bool attempt(const Calls& calls) {
  try {
    calls();
    return true;
  } catch (const Error& error) {
    message = error.what();
    return false;
  }
}

Picture picture_of(const uint8_t* rgb, int64_t height, int64_t width) {
  return {height, width, std::vector<uint8_t>(rgb, rgb + height * width * 3)};
}

void shape_of(const Picture& made, int64_t* shape) { shape[0] = made.height, shape[1] = made.width; }

std::vector<Size> sizes_of(const int64_t* edges, int64_t count) {
  std::vector<Size> sizes;
  for (int64_t i = 0; i < count; ++i) sizes.push_back({edges[2 * i], edges[2 * i + 1]});
  return sizes;
}

}  // namespace

extern "C" {

const char* error_message() { return message.c_str(); }
void take_picture(uint8_t* rgb) { std::memcpy(rgb, picture.rgb.data(), picture.rgb.size()); }
void take_tiles(float* values) { std::memcpy(values, tiles.values.data(), tiles.values.size() * sizeof(float)); }

bool decode(const uint8_t* file, int64_t bytes, int64_t* shape) {
  return attempt([&] {
    picture = decode_picture({file, static_cast<size_t>(bytes)}, "the file");
    shape_of(picture, shape);
  });
}

// box: left, top, right, bottom; null: all of the picture.
bool resize_picture(const uint8_t* rgb, int64_t height, int64_t width, int64_t to_height, int64_t to_width, int filter,
                    const float* box, int64_t* shape) {
  return attempt([&] {
    const Picture from = picture_of(rgb, height, width);
    picture = box ? resize(from, to_height, to_width, Filter{filter}, {box[0], box[1], box[2], box[3]})
                  : resize(from, to_height, to_width, Filter{filter});
    shape_of(picture, shape);
  });
}

// shape: count and side of the tiles, and height and width of the picture.
bool make_tiles_of(const char* manifest, const uint8_t* rgb, int64_t height, int64_t width, int64_t* shape) {
  return attempt([&] {
    const PictureSettings settings = PictureSettings::from(Manifest::read(manifest));
    tiles = make_tiles(picture_of(rgb, height, width), settings);
    shape[0] = tiles.count, shape[1] = tiles.side, shape[2] = tiles.height, shape[3] = tiles.width;
  });
}

// places: height and width of the best pinpoint; top, left, rows and columns of the unpadded grid; the number of tokens.
bool anyres_of(int64_t height, int64_t width, const int64_t* pinpoints, int64_t count, int64_t image_size,
               const int64_t* grid, int64_t* places) {
  return attempt([&] {
    const std::vector<Size> sizes = sizes_of(pinpoints, count);
    const Grid cells{grid[0], grid[1], grid[2], grid[3]};
    const Size best = select_best_resolution({height, width}, sizes);
    const Region region = unpadded_grid({height, width}, best, image_size, cells);
    const int64_t tokens = num_visual_tokens({height, width}, sizes, image_size, cells);
    const int64_t found[] = {best.height, best.width, region.top, region.left, region.rows, region.cols, tokens};
    std::memcpy(places, found, sizeof found);
  });
}

}  // extern "C"
