#ifndef GR_AGENT_BLOB_H
#define GR_AGENT_BLOB_H

/* The agent as the build made it from agent.c: code that runs at any address, its entry at offset 0. */
extern const unsigned char gr_agent_blob[] __attribute__((visibility("hidden")));
extern const unsigned char gr_agent_blob_end[] __attribute__((visibility("hidden")));

#endif
