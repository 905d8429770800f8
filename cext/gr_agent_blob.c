#include "gr_agent_blob.h"

/* agent.bin is found through the include path that the build gives to the assembler. */
__asm__(".pushsection .rodata, \"a\", @progbits\n"
	".balign 64\n"
	".globl gr_agent_blob\n"
	".hidden gr_agent_blob\n"
	"gr_agent_blob:\n"
	".incbin \"agent.bin\"\n"
	".globl gr_agent_blob_end\n"
	".hidden gr_agent_blob_end\n"
	"gr_agent_blob_end:\n"
	".popsection\n");
