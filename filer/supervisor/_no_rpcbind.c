/*
 * Preloaded into NFS-Ganesha where the node does not register with rpcbind.
 *
 * Ganesha has no option for it: it unregisters whoever serves NFS on the host, registers itself,
 * and does not start if it cannot.  Several nodes on one host, or none that may use port 111,
 * need it to leave rpcbind alone; their NFSv3 clients mount with port= and mountport=.
 *
 * Built as an extension module only to be compiled with the package; it is not importable.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* libntirpc's svc_reg asks rpcbind only when it is given a netconfig. */
bool svc_reg(void *transport, uint32_t program, uint32_t version, void *dispatch,
	     const void *netconfig)
{
	bool (*real)(void *, uint32_t, uint32_t, void *, const void *) =
		dlsym(RTLD_NEXT, "svc_reg");

	(void)netconfig;
	return real(transport, program, version, dispatch, NULL);
}

bool rpcb_unset(uint32_t program, uint32_t version, const void *netconfig)
{
	(void)program, (void)version, (void)netconfig;
	return true;
}
