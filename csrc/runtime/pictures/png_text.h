// The text chunks of a PNG: tEXt, zTXt and iTXt.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace minifocus {

// The keyword of a chunk of this type; nullopt for types that are no text.
std::optional<std::string_view> png_keyword(std::string_view type, std::string_view data);

// The text behind the keyword; nullopt where it is damaged or, inflated, longer than 1 MiB.
std::optional<std::string> png_text(std::string_view type, std::string_view data);

}  // namespace minifocus
