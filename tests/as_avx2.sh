#!/usr/bin/env bash
# Run a command as a processor without AVX-512 and matrix unit would: as_avx2.sh COMMAND…  (needs root and `unshare`)
set -euo pipefail
pretended=$(mktemp)
trap 'rm -f "$pretended"' EXIT
sed -E 's/ (avx512[a-z0-9_]*|avx_vnni|avx512_bf16|amx_[a-z0-9]+)//g; /^flags/s/$/ /' /proc/cpuinfo >"$pretended"
export ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
export CXX="g++ -mno-avx512f -mno-avx512bf16 -mno-amx-tile -mno-amx-bf16"
unshare --mount bash -c 'mount --bind "$0" /proc/cpuinfo && exec "$@"' "$pretended" "$@"
