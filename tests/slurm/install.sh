#!/bin/sh
# Debian's SLURM and munge for `make test-slurm`. No service is started.
set -eu
packages="slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "error: make test-slurm needs SLURM and root; on a Debian-like system: sudo apt-get install $packages" >&2
    exit 1
fi
apt-get update -qq
# Without systemd or with a policy against it the services stay down, which is what the tests want.
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages
