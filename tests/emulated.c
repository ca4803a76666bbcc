/* Calls a function of the object that it is linked with, for every case on its standard input.

   usage: emulated INDEX CASE_BYTES RESULT_BYTES */
#include <stdio.h>
#include <stdlib.h>

typedef void function(const char *in, char *out);
extern function *const functions[];

/* Numba's arrays may own memory; those here do not. */
void NRT_MemInfo_call_dtor(void *owned) { (void)owned, abort(); }

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  function *run = functions[atoi(argv[1])];
  size_t in_bytes = atoi(argv[2]), out_bytes = atoi(argv[3]);
  char *in = malloc(in_bytes), *out = malloc(out_bytes);
  while (fread(in, in_bytes, 1, stdin) == 1) {
    run(in, out);
    if (fwrite(out, out_bytes, 1, stdout) != 1) return 1;
  }
  return 0;
}
