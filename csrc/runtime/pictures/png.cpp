// libpng leaves an error by longjmp, past C++. So what it is called from must hold nothing with a destructor: all that is kept
// is made before, and lives in the decoder or its caller.
#include "png.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include <png.h>

#include "../error.h"
#include "png_text.h"

namespace minifocus {
namespace {

// Chunks that are kept. libpng copies them all for each that is added: of millions it would make hours.
constexpr int kMostChunks = 1000;

struct Rgba {
  uint8_t red, green, blue, alpha;
};

// A sample over white, to the nearest whole number.
uint8_t over_white(int sample, int alpha) {
  return static_cast<uint8_t>((2 * (sample * alpha + 255 * (255 - alpha)) + 255) / 510);
}

// "Raw profile type exif": three lines, and then the bytes in hexadecimal digits.
std::string unhexed(std::string_view text) {
  for (int line = 0; line < 3; ++line) {
    const size_t end = text.find('\n');
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  }
  std::string bytes;
  for (size_t i = 0; i < text.size();) {
    if (std::string_view(" \t\n\v\f\r").find(text[i]) != std::string_view::npos) {
      ++i;
      continue;
    }
    const char *digits = text.data() + i, *end = digits + std::min<size_t>(2, text.size() - i);
    unsigned byte = 0;
    if (std::from_chars(digits, end, byte, 16).ptr != digits + 2) return "no digits";  // and no EXIF either
    bytes += static_cast<char>(byte);
    i += 2;
  }
  return bytes;
}

class PngDecoder {
 public:
  PngDecoder(std::span<const uint8_t> file, const std::string& name) : left_(file), name_(name) {
    const auto on_error = [](png_structp png, const char* message) {
      auto* decoder = static_cast<PngDecoder*>(png_get_error_ptr(png));
      std::snprintf(decoder->message_, sizeof decoder->message_, "%s", message);
      png_longjmp(png, 1);
    };
    png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, on_error, [](png_structp, const char*) {});
    info_ = png_ ? png_create_info_struct(png_) : nullptr;
    if (!info_) {
      png_destroy_read_struct(&png_, nullptr, nullptr);
      fail("libpng: expected version ", PNG_LIBPNG_VER_STRING, ", got ", png_get_libpng_ver(nullptr));
    }
  }
  PngDecoder(const PngDecoder&) = delete;
  ~PngDecoder() { png_destroy_read_struct(&png_, &info_, nullptr); }

  void read_header() {
    const size_t file_size = left_.size();
    attempt([&] {
      png_set_read_fn(png_, this, [](png_structp png, png_bytep to, size_t bytes) {
        auto* decoder = static_cast<PngDecoder*>(png_get_io_ptr(png));
        if (bytes > decoder->left_.size()) png_error(png, "the file is cut off");
        if (bytes > decoder->allowance_) png_error(png, "far more pixels than its size says");
        decoder->allowance_ -= bytes;
        std::memcpy(to, decoder->left_.data(), bytes);
        decoder->left_ = decoder->left_.subspan(bytes);
      });
      png_set_user_limits(png_, PNG_UINT_31_MAX, PNG_UINT_31_MAX);  // the number of pixels is what is limited
      png_set_chunk_malloc_max(png_, file_size);                    // a chunk that claims more is cut off
      png_set_chunk_cache_max(png_, kMostChunks);
      png_set_crc_action(png_, PNG_CRC_ERROR_QUIT, PNG_CRC_ERROR_QUIT);
      // Colours are taken as they are stored, whatever a profile says. What else counts is read below.
      png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_NEVER, nullptr, -1);
      constexpr png_byte kept[] = "tRNS\0eXIf\0tEXt\0zTXt\0iTXt";
      png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_ALWAYS, kept, 5);
      png_read_info(png_, info_);
      png_get_IHDR(png_, info_, &width_, &height_, &bits_, &colour_, &interlace_, nullptr, nullptr);
    });
    const int64_t pixels = int64_t{height_} * width_;
    expect(pixels <= kMaxPixels, name_, ": ", height_, "x", width_, " = ", pixels,
           " pixels (height x width) are over the limit of ", kMaxPixels);
    read_palette();
    read_transparency();
  }

  Picture read_pixels() {
    Picture picture = filled(height_, width_, {});
    std::vector<uint8_t> line(int64_t{width_} * 8);  // four samples of 16 bits at most
    const std::vector<Pass> passes = passes_of_picture();
    attempt([&] {
      png_set_packing(png_);  // a byte for each sample of fewer bits
      png_start_read_image(png_);
      for (const Pass& pass : passes) read_rows(picture, line.data(), pass, &pass == &passes.back());
      allowance_ = SIZE_MAX;
      png_read_end(png_, info_);
    });
    return picture;
  }

  // To be called last: it may be behind the pixels. Of several chunks, the last counts.
  PictureMetadata metadata() const {
    PictureMetadata metadata;
    for (const auto& [type, data, before_pixels] : chunks()) {
      if (type == "eXIf") metadata.exif.emplace(data);
    }
    const auto profile = text("Raw profile type exif");
    if (profile && !metadata.exif) metadata.exif = unhexed(*profile);
    metadata.xmp = text("XML:com.adobe.xmp").value_or("");
    return metadata;
  }

 private:
  struct Chunk {
    std::string_view type, data;
    bool before_pixels;
  };

  // The rows and columns whose pixels follow one another in the file.
  struct Pass {
    int64_t top, row_step, left, column_step;
  };

  // One of all, or Adam7's, without those that have no pixels.
  std::vector<Pass> passes_of_picture() const {
    if (interlace_ == PNG_INTERLACE_NONE) return {{0, 1, 0, 1}};
    std::vector<Pass> passes;
    for (int i = 0; i < PNG_INTERLACE_ADAM7_PASSES; ++i) {
      const Pass pass{PNG_PASS_START_ROW(i), 1 << PNG_PASS_ROW_SHIFT(i), PNG_PASS_START_COL(i),
                      1 << PNG_PASS_COL_SHIFT(i)};
      if (pass.top < height_ && pass.left < width_) passes.push_back(pass);
    }
    return passes;
  }

  // The chunks that were kept, in the order of the file.
  std::vector<Chunk> chunks() const {
    png_unknown_chunkp stored = nullptr;
    const int count = png_get_unknown_chunks(png_, info_, &stored);
    // libpng drops what is beyond its limit, and stops one short of it to say so.
    expect(count < kMostChunks - 2, name_, ": expected fewer than ", kMostChunks - 2, " chunks of text, got more");
    std::vector<Chunk> chunks;
    for (int i = 0; i < count; ++i) {
      const auto& [name, data, size, location] = stored[i];
      const bool before_pixels = !(location & PNG_AFTER_IDAT);
      chunks.push_back(
          {reinterpret_cast<const char*>(name), {reinterpret_cast<const char*>(data), size}, before_pixels});
    }
    return chunks;
  }

  // The text of the last chunk with this keyword; nullopt where there is none, or it is damaged.
  std::optional<std::string> text(std::string_view keyword) const {
    const std::vector<Chunk> kept = chunks();
    for (auto chunk = kept.rbegin(); chunk != kept.rend(); ++chunk) {
      if (png_keyword(chunk->type, chunk->data) == keyword) return png_text(chunk->type, chunk->data);
    }
    return std::nullopt;
  }

  // Calls libpng. What it complains of is thrown from here, where no C frame is left.
  template <class Calls>
  void attempt(const Calls& calls) {
    if (setjmp(png_jmpbuf(png_))) fail(name_, ": not a picture that can be read: ", message_);
    calls();
  }

  // What is beyond the colours of a palette is black.
  void read_palette() {
    png_colorp colours = nullptr;
    int count = 0;
    palette_.fill({0, 0, 0, 255});
    if (colour_ != PNG_COLOR_TYPE_PALETTE || !png_get_PLTE(png_, info_, &colours, &count)) return;
    for (int i = 0; i < count; ++i) palette_[i] = {colours[i].red, colours[i].green, colours[i].blue, 255};
  }

  // The alphas of a palette, or the one value that is transparent, by as many bits as a sample has.
  void read_transparency() {
    std::optional<std::string_view> clear;
    for (const auto& [type, data, before_pixels] : chunks()) {
      if (type == "tRNS" && before_pixels) clear = data;
    }
    if (!clear || (colour_ & PNG_COLOR_MASK_ALPHA)) return;
    if (colour_ == PNG_COLOR_TYPE_PALETTE) {
      const size_t count = std::min(clear->size(), palette_.size());
      for (size_t i = 0; i < count; ++i) palette_[i].alpha = static_cast<uint8_t>((*clear)[i]);
      return;
    }
    const size_t samples = colour_ == PNG_COLOR_TYPE_GRAY ? 1 : 3;
    expect(clear->size() >= 2 * samples, name_, ": not a picture that can be read: tRNS: expected ", 2 * samples,
           " bytes, got ", clear->size());
    has_clear_ = true;
    for (size_t i = 0; i < samples; ++i) {
      const int value = deep(reinterpret_cast<const uint8_t*>(clear->data()) + 2 * i);
      clear_[i] = bits_ == 1 ? value != 0 : value & ((1 << bits_) - 1);
    }
  }

  static int deep(const uint8_t* sample) { return sample[0] << 8 | sample[1]; }

  void read_rows(Picture& picture, uint8_t* line, const Pass& pass, bool is_last) {
    const bool as_stored = colour_ == PNG_COLOR_TYPE_RGB && bits_ == 8 && !has_clear_ && pass.column_step == 1;
    for (int64_t y = pass.top; y < picture.height; y += pass.row_step) {
      // With the last row, libpng inflates all that comes behind it, which may be a thousand times what the file has.
      if (is_last && y + pass.row_step >= picture.height) allowance_ = 16 * int64_t{width_} + (1 << 16);
      if (as_stored) {
        png_read_row(png_, picture.row(y), nullptr);
        continue;
      }
      png_read_row(png_, line, nullptr);
      uint8_t* to = picture.row(y);
      for (int64_t x = pass.left, i = 0; x < picture.width; x += pass.column_step, ++i) {
        const Rgba pixel = pixel_at(line, i);
        to[3 * x] = over_white(pixel.red, pixel.alpha);
        to[3 * x + 1] = over_white(pixel.green, pixel.alpha);
        to[3 * x + 2] = over_white(pixel.blue, pixel.alpha);
      }
    }
  }

  // Of deep colours, the high bytes.
  Rgba pixel_at(const uint8_t* line, int64_t x) const {
    const int64_t bytes = bits_ == 16 ? 2 : 1;
    switch (colour_) {
      case PNG_COLOR_TYPE_GRAY: return grey(bytes == 2 ? deep(line + 2 * x) : line[x]);
      case PNG_COLOR_TYPE_PALETTE: return palette_[line[x]];
      case PNG_COLOR_TYPE_RGB: {
        const uint8_t* pixel = line + x * 3 * bytes;
        bool is_clear = has_clear_;
        for (int i = 0; i < 3; ++i) is_clear &= (bytes == 2 ? deep(pixel + 2 * i) : pixel[i]) == clear_[i];
        return {pixel[0], pixel[bytes], pixel[2 * bytes], static_cast<uint8_t>(is_clear ? 0 : 255)};
      }
      case PNG_COLOR_TYPE_GRAY_ALPHA: {
        const uint8_t* pixel = line + x * 2 * bytes;
        return {pixel[0], pixel[0], pixel[0], pixel[bytes]};
      }
      default: {
        const uint8_t* pixel = line + x * 4 * bytes;
        return {pixel[0], pixel[bytes], pixel[2 * bytes], pixel[3 * bytes]};
      }
    }
  }

  // To the nearest of 256 levels.
  Rgba grey(int sample) const {
    const int level = bits_ == 16 ? (sample + 128) / 257 : sample * (255 / ((1 << bits_) - 1));
    const auto byte = static_cast<uint8_t>(level);
    return {byte, byte, byte, static_cast<uint8_t>(has_clear_ && sample == clear_[0] ? 0 : 255)};
  }

  std::span<const uint8_t> left_;  // of the file
  size_t allowance_ = SIZE_MAX;    // the most of it that may be read now
  const std::string& name_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
  png_uint_32 height_ = 0, width_ = 0;
  int bits_ = 0, colour_ = 0, interlace_ = 0;
  std::array<Rgba, 256> palette_;
  bool has_clear_ = false;
  std::array<int, 3> clear_{};
  char message_[256];
};

}  // namespace

Picture decode_png(std::span<const uint8_t> file, const std::string& name, PictureMetadata& metadata) {
  PngDecoder decoder(file, name);
  decoder.read_header();
  Picture picture = decoder.read_pixels();
  metadata = decoder.metadata();
  return picture;
}

}  // namespace minifocus
