#!/bin/bash
# qemu-icount.sh: QEMU with a clock that counts instructions, two nanoseconds each, so that the results of
# a benchmark do not depend on the machine's other load. It needs emulation in one thread.
args=()
for a; do
	[ "$a" != tcg,thread=multi ] || a=tcg,thread=single
	args+=("$a")
done
exec qemu-system-x86_64 -icount shift=1,sleep=off "${args[@]}"
