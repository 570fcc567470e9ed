/* Preloaded into the tests' NAS: serve on the configured ports without telling rpcbind.
 *
 * NFS-Ganesha 4.3 does not start when it cannot register, and where rpcbind runs the NAS would
 * take the registrations of the node under test, and remove them when it stops.
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
