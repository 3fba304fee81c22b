// Keeps a wheel that is built on a newer glibc loadable on glibc 2.28; `make wheel` links it in.
//
// Two symbols would be newer: `log` has a version of 2.29, which sets errno in another way, and
// libstdc++'s reference counts read `__libc_single_threaded` of 2.32 to save atomic instructions.

#if defined(__x86_64__) && defined(__linux__)
#define HIDDEN __attribute__((visibility("hidden")))

double log_2_2_5(double x);
__asm__(".symver log_2_2_5, log@GLIBC_2.2.5");

HIDDEN double log(double x) { return log_2_2_5(x); }

HIDDEN char __libc_single_threaded = 0;
#endif
