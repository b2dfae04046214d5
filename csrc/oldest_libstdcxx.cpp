// What compilers of today take from libstdc++ and glibc that systems with glibc 2.28 lack, here in the module itself.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__) && defined(__GLIBC__)
extern "C" {
// Asked by reference counts whether they may do without atomic operations: no.
[[gnu::visibility("hidden")]] char __libc_single_threaded = 0;

// Named by <iostream> since g++ 13, to prepare streams; no file here uses them.
[[gnu::visibility("hidden")]] void _ZSt21ios_base_library_initv() {}
}

void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }

template std::basic_ostringstream<char>::basic_ostringstream();
template std::string std::basic_stringbuf<char>::str() const&;
#endif
