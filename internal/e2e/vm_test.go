package e2e

import (
	"os"
	"os/exec"
	"testing"
)

// TestVirtualMachines boots two virtual machines on clones of one image over NBD, and kills the owner while they write
// (testdata/vm/run.sh, which make vm-test runs with ten). It needs QEMU and Debian's packages, and takes a minute or two
// where there is no KVM. So it runs only with VDISK_VM=1.
func TestVirtualMachines(t *testing.T) {
	if os.Getenv("VDISK_VM") != "1" || inGuest {
		t.Skip("set VDISK_VM=1 to boot virtual machines; make vm-test runs ten")
	}
	bin, err := vdiskBinary()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("../../testdata/vm/run.sh", t.TempDir())
	cmd.Env = append(os.Environ(), "VDISK="+bin, "VMS=2", "PEERS=vdisk")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
}
