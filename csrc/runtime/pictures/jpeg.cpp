// libjpeg leaves an error by longjmp, past C++. So what it is called from must hold nothing with a destructor: all that is
// kept is made before, and lives in the decoder or its caller.
#include "jpeg.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <vector>

#include <jpeglib.h>

#include "../error.h"

namespace minifocus {
namespace {

// How many scans a file may have. Each goes over the whole picture, however few bytes it has. Encoders write about ten.
constexpr int64_t most_scans(int64_t pixels) { return std::clamp<int64_t>(20 * kMaxPixels / pixels, 20, 100); }

class JpegDecoder {
 public:
  JpegDecoder(std::span<const uint8_t> file, const std::string& name) : file_(file), name_(name) {
    info_.err = jpeg_std_error(&errors_);
    info_.client_data = this;
    errors_.error_exit = [](j_common_ptr info) {
      auto* decoder = static_cast<JpegDecoder*>(info->client_data);
      info->err->format_message(info, decoder->message_);
      std::longjmp(decoder->escape_, 1);
    };
    errors_.output_message = [](j_common_ptr) {};  // warnings, which viewers do not heed

    // All of the file is there at the start. At its end, libjpeg is told to wait for more, and returns.
    source_.next_input_byte = file.data();
    source_.bytes_in_buffer = file.size();
    source_.init_source = [](j_decompress_ptr) {};
    source_.fill_input_buffer = [](j_decompress_ptr) -> boolean { return FALSE; };
    source_.skip_input_data = [](j_decompress_ptr info, long bytes) {
      if (bytes <= 0) return;
      const size_t skipped = std::min(static_cast<size_t>(bytes), info->src->bytes_in_buffer);
      info->src->next_input_byte += skipped;
      info->src->bytes_in_buffer -= skipped;
    };
    source_.resync_to_restart = jpeg_resync_to_restart;
    source_.term_source = [](j_decompress_ptr) {};

    progress_.progress_monitor = [](j_common_ptr info) {
      auto* decoder = static_cast<JpegDecoder*>(info->client_data);
      const int64_t most = most_scans(int64_t{decoder->info_.image_height} * decoder->info_.image_width);
      if (decoder->info_.input_scan_number <= most) return;
      std::snprintf(decoder->message_, sizeof decoder->message_, "more than %d scans", static_cast<int>(most));
      std::longjmp(decoder->escape_, 1);
    };
  }
  JpegDecoder(const JpegDecoder&) = delete;
  ~JpegDecoder() { jpeg_destroy_decompress(&info_); }

  void read_header() {
    bool whole = false;
    attempt([&] {
      jpeg_create_decompress(&info_);
      info_.src = &source_;
      info_.progress = &progress_;
      whole = jpeg_read_header(&info_, TRUE) == JPEG_HEADER_OK;
    });
    expect(whole, name_, kUnreadable, "the file is cut off");
    const int64_t height = info_.image_height, width = info_.image_width;
    expect(height * width <= kMaxPixels, name_, ": ", height, "x", width, " = ", height * width,
           " pixels (height x width) are over the limit of ", kMaxPixels);
    const int channels = info_.num_components;
    expect(channels == 1 || channels == 3 || channels == 4, name_, kUnreadable, "expected 1, 3 or 4 channels, got ",
           channels);
  }

  // What APP1 segments before the pixels hold. EXIF may be in several of them; of several XMP packets, the last counts.
  PictureMetadata metadata() const {
    constexpr std::string_view kExif("Exif\0\0", 6), kXmp("http://ns.adobe.com/xap/1.0/\0", 29);
    PictureMetadata metadata;
    for (size_t place = 2; place + 4 <= file_.size();) {
      const uint8_t marker = file_[place] == 0xFF ? file_[place + 1] : 0;
      if (marker == 0 || marker == 0xFF || (marker >= 0xD0 && marker <= 0xD9)) {
        ++place;  // between segments
        continue;
      }
      if (marker == 0xDA) break;  // the start of a scan
      const size_t length = file_[place + 2] << 8 | file_[place + 3];
      const auto segment = file_.subspan(place + 2, std::min(length, file_.size() - place - 2));
      place += 2 + length;
      std::string_view data(reinterpret_cast<const char*>(segment.data()), segment.size());
      data.remove_prefix(std::min<size_t>(data.size(), 2));  // the length
      if (marker == 0xE1 && data.starts_with(kExif)) {
        if (!metadata.exif) metadata.exif.emplace(kExif);
        metadata.exif->append(data.substr(kExif.size()));
      } else if (marker == 0xE1 && data.starts_with(kXmp)) {
        metadata.xmp = data.substr(kXmp.size());
      }
    }
    return metadata;
  }

  Picture read_pixels() {
    Picture picture = filled(info_.image_height, info_.image_width, {});
    std::vector<uint8_t> line(picture.width * 4);
    bool whole = false, scans_missing = false;
    attempt([&] {
      const int channels = info_.num_components;
      info_.out_color_space = channels == 1 ? JCS_GRAYSCALE : channels == 3 ? JCS_RGB : JCS_CMYK;
      if (!jpeg_start_decompress(&info_)) return;
      scans_missing = any_scan_missing();
      if (scans_missing) return;
      for (int64_t y = 0; y < picture.height; ++y) {
        uint8_t* row = channels == 3 ? picture.row(y) : line.data();
        if (jpeg_read_scanlines(&info_, &row, 1) != 1) return;
        if (channels == 1) widen_grey(row, picture.row(y), picture.width);
        if (channels == 4) multiply_black(row, picture.row(y), picture.width);
      }
      jpeg_finish_decompress(&info_);  // an end that is missing is not missed: all rows are there
      whole = true;
    });
    expect(!scans_missing, name_, kUnreadable, "scans of a progressive JPEG are missing");
    expect(whole, name_, kUnreadable, "the file is cut off");
    return picture;
  }

 private:
  static constexpr const char* kUnreadable = ": not a picture that can be read: ";

  // Calls libjpeg. What it complains of is thrown from here, where no C frame is left.
  template <class Calls>
  void attempt(const Calls& calls) {
    if (setjmp(escape_)) fail(name_, kUnreadable, message_);
    calls();
  }

  // Whether a progressive file leaves low frequencies open. Versions of libjpeg then smooth the picture differently.
  bool any_scan_missing() const {
    constexpr int kLowFrequencies = 10;
    for (int component = 0; info_.coef_bits && component < info_.num_components; ++component) {
      for (int i = 0; i < kLowFrequencies; ++i) {
        if (info_.coef_bits[component][i] != 0) return true;  // bits that are not known yet, or -1: none is
      }
    }
    return false;
  }

  static void widen_grey(const uint8_t* from, uint8_t* to, int64_t width) {
    for (int64_t x = 0; x < width; ++x) to[3 * x] = to[3 * x + 1] = to[3 * x + 2] = from[x];
  }

  // Inks are stored as Adobe does: 255 is none, and a colour is what its ink and the black let through.
  static void multiply_black(const uint8_t* from, uint8_t* to, int64_t width) {
    for (int64_t x = 0; x < width; ++x, from += 4, to += 3) {
      for (int i = 0; i < 3; ++i) to[i] = static_cast<uint8_t>((2 * from[i] * from[3] + 255) / 510);
    }
  }

  std::span<const uint8_t> file_;
  const std::string& name_;
  jpeg_decompress_struct info_{};
  jpeg_error_mgr errors_{};
  jpeg_source_mgr source_{};
  jpeg_progress_mgr progress_{};
  std::jmp_buf escape_;
  char message_[JMSG_LENGTH_MAX];
};

}  // namespace

Picture decode_jpeg(std::span<const uint8_t> file, const std::string& name, PictureMetadata& metadata) {
  JpegDecoder decoder(file, name);
  decoder.read_header();
  metadata = decoder.metadata();
  return decoder.read_pixels();
}

}  // namespace minifocus
