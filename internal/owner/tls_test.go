package owner

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/testpki"
)

// NBD over TCP is served only with TLS. This also holds for a socket that was passed by socket activation.
func TestTCPNeedsTLS(t *testing.T) {
	if _, err := secured("tcp", ServeOptions{}); !errors.Is(err, cow.ErrInvalid) {
		t.Fatal(err) // Serve would not return
	}
	dir := newStore(t)
	o := offer(t, dir)
	for name, s := range map[string]Store{"owner": o, "client": open(t, dir)} {
		l, err := net.Listen("tcp", "localhost:0")
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Serve(t.Context(), l, ServeOptions{}); !errors.Is(err, cow.ErrInvalid) || !strings.Contains(err.Error(), "only with TLS") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The files of a server are what they should be, or are refused.
func TestTLSFiles(t *testing.T) {
	ours, err := testpki.New("ours")
	if err != nil {
		t.Fatal(err)
	}
	for name, x := range map[string]struct {
		spoil func(dir string) error
		want  string
		kind  error
	}{
		"good":                  {func(string) error { return nil }, "", nil},
		"no key":                {func(dir string) error { return os.Remove(filepath.Join(dir, serverKey)) }, serverKey, fs.ErrNotExist},
		"no authority":          {func(dir string) error { return os.Remove(filepath.Join(dir, caFile)) }, caFile, fs.ErrNotExist},
		"an empty authority":    {func(dir string) error { return os.Truncate(filepath.Join(dir, caFile), 0) }, "no certificate", cow.ErrInvalid},
		"a key for all":         {func(dir string) error { return os.Chmod(filepath.Join(dir, serverKey), 0o604) }, "by others", cow.ErrInvalid},
		"a key that all change": {func(dir string) error { return os.Chmod(filepath.Join(dir, serverKey), 0o602) }, "by others", cow.ErrInvalid},
		"another key":           {func(dir string) error { return ours.Server(dir) }, "", nil},
		"another's key": {func(dir string) error {
			other := t.TempDir()
			return errors.Join(ours.Server(other), os.Rename(filepath.Join(other, serverKey), filepath.Join(dir, serverKey)))
		}, serverKey, cow.ErrInvalid},
		"an old certificate": {func(dir string) error {
			return ours.Server(dir, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
		}, "expired", cow.ErrInvalid},
		"a revocation list": {func(dir string) error { return os.WriteFile(filepath.Join(dir, crlFile), nil, 0o600) }, "revocation", cow.ErrInvalid},
		"a folder": {func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, caFile)), os.Mkdir(filepath.Join(dir, caFile), 0o700))
		}, "no regular file", cow.ErrInvalid},
		"too long": {func(dir string) error { return os.Truncate(filepath.Join(dir, serverCert), maxPEM+1) }, "more than", cow.ErrInvalid},
	} {
		dir := t.TempDir()
		if err := errors.Join(ours.Server(dir), x.spoil(dir)); err != nil {
			t.Fatal(err)
		}
		c, err := TLSConfig(dir)
		switch {
		case x.kind == nil && (err != nil || c.ClientAuth != tls.RequireAndVerifyClientCert):
			t.Errorf("%s: %v", name, err)
		case x.kind != nil && (!errors.Is(err, x.kind) || !strings.Contains(err.Error(), x.want)):
			t.Errorf("%s: %v", name, err)
		}
	}
	// A group may read a key that root gave it, and no other.
	if os.Geteuid() != 0 {
		return
	}
	dir := t.TempDir()
	key := filepath.Join(dir, serverKey)
	if err := errors.Join(ours.Server(dir), os.Chmod(key, 0o640)); err != nil {
		t.Fatal(err)
	}
	if _, err := TLSConfig(dir); err != nil {
		t.Error(err)
	}
	if err := os.Chown(key, 1, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := TLSConfig(dir); err == nil || !strings.Contains(err.Error(), "belongs to user") {
		t.Error(err)
	}
}
