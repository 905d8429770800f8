/* The bits of an entry of /proc/PID/pagemap, one of 8 bytes per page: Documentation/admin-guide/mm/pagemap.rst */
#ifndef GR_PAGEMAP_ENTRY_H
#define GR_PAGEMAP_ENTRY_H

#define PM_FRAME ((1UL << 55) - 1) /* 0 where the kernel hides it; of a page in swap: its place there */
#define PM_EXCLUSIVE (1UL << 56)
#define PM_GUARD (1UL << 58)
#define PM_FILE (1UL << 61)
#define PM_SWAP (1UL << 62)
#define PM_PRESENT (1UL << 63)

#endif
