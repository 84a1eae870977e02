// Package guest runs programs as root in a throw-away virtual machine whose kernel has ublk, nbd, loop, fuse and device
// mapper, on hosts whose own kernel has none of them.
//
// # Parts of a guest
//
//	root image   Debian trixie (debootstrap), the packages in rootPackages; every run writes to its own overlay,
//	             or to the one that Run.RootFile names
//	kernel       a Debian cloud kernel: "stable" is the newest 6.12 of bookworm's security suite, "newest" the
//	             newest of trixie-backports; its modules are in a separate image, mounted at /usr/lib/modules
//	initrd       made at every run from busybox, virtio modules and the scripts embedded here
//	payload      a tar archive on a virtio disk, unpacked to tmpfs at /payload; /payload/bin is first on PATH
//	scratch      ext4 on a sparse file, mounted at /scratch ($VDISK_SCRATCH)
//	results      ext4, mounted at /results ($VDISK_RESULTS), copied to the caller's folder afterwards
//
// With Run.Systemd, systemd is process 1, and the payload's script a service of it. When the script has ended, the guest
// goes down in order, as for a reboot; the next run with the same RootFile is what comes up after it.
//
// Build makes the root image and the kernels in a cache folder ($VDISK_GUEST_DIR, or else .guest beside go.mod). It
// does nothing if the folder has them already, made by the same recipe. Building needs root and apt; running needs only
// QEMU. If the machine cannot do it, the error matches ErrUnavailable, and its text says what to do.
//
// # Output and events of a run
//
// The kernel's console is a serial port whose output goes to a file, apart from the payload's output. The payload's
// stdout and stderr come in one stream over a virtio port. Events travel in the same stream, so they cannot overtake
// output. An event is 0x1e, a nonce of the run, a blank, a word (ready, exit N, powercut) and a newline. The host
// answers "exit" with a line. Only then does the guest reset, so no output is lost.
//
// A run ends with the payload's exit status, a kernel panic (ErrPanic), the death of QEMU (ErrDied), a boot that did
// not finish (ErrBoot, after retries), or its deadline (ErrTimeout). QEMU is killed in every case, and also when the
// calling process dies. The command vdisk-powercut in the guest makes the host kill QEMU at once. With Run.ScratchFile,
// the next run then finds the scratch disk as a power failure would leave it.
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
//	go run ./internal/guest/cmd/guest kernel newest
//
// "guest test" boots each kernel once. In the guest it runs the test binary of each package, in a folder with the
// package's testdata, and then, with bash, each script of testdata/guest/*.sh. vdisk is on PATH if there is a
// ./cmd/vdisk. A test binary or script fails if its exit status is not 0. A kernel fails if it logs a hung task, a bug
// or an oops. In a guest, tests find VDISK_GUEST=1 in their environment.
//
// The command's exit status is the payload's, or 77 if this machine cannot run a guest, 124 after the deadline, and 125
// if the guest panicked, died or did not boot, or if the command line was wrong.
package guest
