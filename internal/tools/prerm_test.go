package tools

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestPrerm runs the package's removal script with programs that note how they are called. While a client is
// connected, or a disk is in use, it must stop no unit. Otherwise it must stop all of them.
func TestPrerm(t *testing.T) {
	script, err := os.ReadFile("../../packaging/deb/prerm")
	if err != nil {
		t.Fatal(err)
	}
	const running = "/run/systemd/system"
	if !strings.Contains(string(script), running) {
		t.Fatal("the script does not ask whether systemd runs")
	}
	const none = `echo '{"clients": []}'`
	for _, c := range []struct {
		name, clients, detach string // shell commands
		ends                  bool
	}{
		{"idle", none, "exit 0", true},
		{"a client", `echo '{'; echo '"client": "nbd:1"}'`, "exit 0", false},
		{"a disk in use", none, "exit 5", false},
		{"a disk of the second store in use", none, `[ "$VDISK_STORE" = /var/lib/vdisk ] || exit 5`, false},
		{"a store that is gone", "exit 3", "exit 0", true},
		{"a damaged store", "exit 6", "exit 0", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			log := filepath.Join(dir, "log")
			for name, text := range map[string]string{
				"prerm":          strings.ReplaceAll(string(script), running, dir),
				"systemctl":      `[ "$1" != list-units ] || printf '%s loaded active running x\n' vdisk@var-lib-vdisk.service vdisk@two.service`,
				"systemd-escape": `case "$*" in '--unescape --path var-lib-vdisk') echo /var/lib/vdisk;; '--unescape --path two') echo /two;; *) exit 1;; esac`,
				"vdisk":          `case $VDISK_STORE in /var/lib/vdisk | /two) ;; *) exit 2;; esac` + "\ncase $1 in clients) " + c.clients + ";; ls) echo -; echo /dev/ublkb0;; detach) " + c.detach + ";; esac",
			} {
				text = "#!/bin/sh\necho \"$(basename \"$0\") $*\" >>" + log + "\n" + strings.TrimPrefix(text, "#!/bin/sh\n")
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command("sh", filepath.Join(dir, "prerm"), "remove")
			cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
			out, err := cmd.CombinedOutput()
			said, lerr := os.ReadFile(log)
			if (err == nil) != c.ends || lerr != nil {
				t.Fatalf("%v, %v: %s%s", err, lerr, out, said)
			}
			var stopped strings.Builder
			for line := range strings.Lines(string(said)) {
				if strings.HasPrefix(line, "systemctl stop") {
					stopped.WriteString(line)
				}
			}
			for _, unit := range []string{"vdisk@var-lib-vdisk.service", "vdisk@two.service", "vdisk-nbd@var-lib-vdisk.socket", "vdisk-auto@*.timer", "vdisk-nbd@*.socket"} {
				if strings.Contains(stopped.String(), unit) != c.ends {
					t.Errorf("%s is stopped: %t; %s", unit, !c.ends, said)
				}
			}
		})
	}
}

// TestPackageWithoutManager configures, removes and purges the package where systemd is there and does not answer.
func TestPackageWithoutManager(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"systemctl", "modprobe", "find"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\nexit 1\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"postinst", "configure", ""}, {"postinst", "configure", "0.1.0-1"}, {"postrm", "remove"}, {"postrm", "purge"}} {
		script, err := os.ReadFile("../../packaging/deb/" + args[0])
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sh", append([]string{"-c", strings.ReplaceAll(string(script), "/run/systemd/system", dir)}, args...)...)
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%q: %v: %s", args, err, out)
		}
	}
}
