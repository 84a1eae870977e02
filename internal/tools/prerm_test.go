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
	for _, c := range []struct {
		name, clients, detach string
		ends                  bool
	}{
		{"idle", `{"clients": []}`, "exit 0", true},
		{"a client", "{\n\"clients\": [\n{\n\"client\": \"nbd:1\"}]}", "exit 0", false},
		{"a disk in use", `{"clients": []}`, "exit 5", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			log := filepath.Join(dir, "log")
			for name, text := range map[string]string{
				"prerm":          strings.ReplaceAll(string(script), running, dir),
				"systemctl":      `[ "$1" != list-units ] || echo 'vdisk@var-lib-vdisk.service loaded active running x'`,
				"systemd-escape": `[ "$*" = '--unescape --path var-lib-vdisk' ] && echo /var/lib/vdisk`,
				"vdisk":          `[ "$VDISK_STORE" = /var/lib/vdisk ] || exit 3` + "\ncase $1 in clients) echo '" + c.clients + "';; ls) echo -; echo /dev/ublkb0;; detach) " + c.detach + ";; esac",
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
			for _, unit := range []string{"vdisk@var-lib-vdisk.service", "vdisk-nbd@var-lib-vdisk.socket", "vdisk-auto@*.timer", "vdisk-nbd@*.socket"} {
				if strings.Contains(stopped.String(), unit) != c.ends {
					t.Errorf("%s is stopped: %t; %s", unit, !c.ends, said)
				}
			}
		})
	}
}
