// Included before every file on Linux (setup.py). What is linked on a new system asks for the newest version of each
// function of glibc, and so for a new glibc. Those named here differ from their first version in errno alone, so that
// one is asked for: what is compiled anywhere runs from glibc 2.28 on, as torch's own wheels do.
#pragma once
#include <features.h>

#ifdef __GLIBC__
#if defined(__x86_64__)
#define GPTFAST_FIRST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define GPTFAST_FIRST_GLIBC "GLIBC_2.17"
#endif
#ifdef GPTFAST_FIRST_GLIBC
__asm__(".symver exp,exp@" GPTFAST_FIRST_GLIBC);
__asm__(".symver log,log@" GPTFAST_FIRST_GLIBC);
__asm__(".symver pow,pow@" GPTFAST_FIRST_GLIBC);
__asm__(".symver sqrt,sqrt@" GPTFAST_FIRST_GLIBC);
__asm__(".symver sqrtf,sqrtf@" GPTFAST_FIRST_GLIBC);
#endif
#endif
