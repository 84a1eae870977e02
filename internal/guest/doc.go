// Package guest runs programs as root in a throw-away virtual machine whose kernel has ublk, nbd, loop, fuse and
// device mapper, on hosts whose own kernel has none of them.
//
// # What a guest is made of
//
//	root image   Debian trixie (debootstrap), the packages in rootPackages; every run writes to its own overlay
//	kernel       a Debian cloud kernel: "stable" is the newest 6.12 of bookworm's security suite, "newest" the
//	             newest of trixie-backports; its modules are an image of their own, mounted at /usr/lib/modules
//	initrd       made at every run from busybox, virtio modules and the scripts embedded here
//	payload      a tar archive on a virtio disk, unpacked to tmpfs at /payload; /payload/bin is first on PATH
//	scratch      ext4 on a sparse file, mounted at /scratch ($VDISK_SCRATCH)
//	results      ext4, mounted at /results ($VDISK_RESULTS), copied to the caller's folder afterwards
//
// Build makes root image and kernels in a cache folder ($VDISK_GUEST_DIR, else .guest beside go.mod) and does
// nothing when what is there was made by the same recipe. Building needs root and apt; running needs QEMU only.
// When the machine cannot do it the error matches ErrUnavailable and says the way out.
//
// # How a run talks
//
// The kernel's console is a serial port that goes to a file, so that output of the payload stays clean. The payload's
// stdout and stderr, one stream, come over a virtio port. Events travel in the same stream, so they cannot overtake
// output: 0x1e, a nonce of the run, a blank, a word (ready, exit N, powercut), a newline. After "exit" the host
// answers with a line, and only then the guest resets, so no output is lost.
//
// A run ends with the payload's exit status, a kernel panic (ErrPanic), the death of QEMU (ErrDied), a boot that
// did not finish (ErrBoot, after retries), or its deadline (ErrTimeout); QEMU is killed in every case and also
// when the calling process dies. The command vdisk-powercut in the guest asks the host to kill QEMU at once: with
// Run.ScratchFile the next run sees what a machine would after losing its power.
//
// # From the shell
//
//	go run ./internal/guest/cmd/guest build
//	go run ./internal/guest/cmd/guest run -kernel newest -timeout 2m -bin ./bin/vdisk -- vdisk version
//	go run ./internal/guest/cmd/guest run -bin ublk.test -results out -- sh -c 'modprobe ublk_drv && ublk.test -test.v'
//	go run ./internal/guest/cmd/guest shell -kernel stable
//	go run ./internal/guest/cmd/guest test -kernel all ./ublk ./cmd/vdisk
//	go run ./internal/guest/cmd/guest kernels
//	go run ./internal/guest/cmd/guest headers
//	go run ./internal/guest/cmd/guest package vdo
//
// "guest test" boots once a kernel and runs in it the test binary of each package, in a folder with the package's
// testdata, and then each script of testdata/guest/*.sh, with bash; vdisk (if there is a ./cmd/vdisk) is on PATH.
// Every one that exits with a status other than 0 has failed, and so has a kernel that tells of a hung task, a bug
// or an oops. Tests know the guest by VDISK_GUEST=1.
//
// The command's exit status is that of the payload; 77 when a guest cannot be had here, 124 after the deadline,
// 125 when the guest panicked, died or did not boot, or the command was used wrongly.
package guest
