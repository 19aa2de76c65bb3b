// The operators of csrc/cpu, which parts of a package and the runtime itself call by name.
#pragma once

namespace minifocus {

// Registers them with torch; ../register.cpp. Once in a process, and not where they are there already.
void register_operators();

}  // namespace minifocus
