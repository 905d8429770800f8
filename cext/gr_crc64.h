#ifndef GR_CRC64_H
#define GR_CRC64_H

#include <stdint.h>
#include "gr_error.h"

/*
 * CRC-64/NVME (NVM Express NVM command set 1.0, 5.2.1.3.4): of "123456789" it is ae8b14860a799888. The checksum of two
 * pieces one behind the other follows from theirs, so pieces can be summed by several threads. 0 is that of nothing.
 */
uint64_t gr_crc64(uint64_t crc, const void *data, uint64_t bytes);
uint64_t gr_crc64_combine(uint64_t first, uint64_t second, uint64_t second_bytes);

/* Continue *crc with `bytes` bytes of a file; -ENODATA if it ends before. */
int gr_crc64_file(int fd, uint64_t offset, uint64_t bytes, uint64_t *crc, struct gr_error *err);

#endif
