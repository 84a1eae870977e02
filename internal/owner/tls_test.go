package owner

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
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
		"an empty revocation list": {func(dir string) error { return os.WriteFile(filepath.Join(dir, crlFile), nil, 0o600) }, "no revocation list", cow.ErrInvalid},
		"a revocation list":        {func(dir string) error { return ours.Revoke(filepath.Join(dir, crlFile), nil) }, "", nil},
		"another's revocation list": {func(dir string) error {
			other, err := testpki.New("ours")
			return errors.Join(err, other.Revoke(filepath.Join(dir, crlFile), nil))
		}, "cannot be verified", cow.ErrInvalid},
		"an old revocation list": {func(dir string) error {
			return ours.Revoke(filepath.Join(dir, crlFile), func(l *x509.RevocationList) { l.NextUpdate = time.Now().Add(-time.Minute) })
		}, "expired", cow.ErrInvalid},
		"a part of a revocation list": {func(dir string) error {
			return ours.Revoke(filepath.Join(dir, crlFile), func(l *x509.RevocationList) {
				l.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 27}, Critical: true, Value: []byte{2, 1, 0}}} // a delta
			})
		}, "critical extension", cow.ErrInvalid},
		"a revocation list of something else": {func(dir string) error {
			return os.Link(filepath.Join(dir, caFile), filepath.Join(dir, crlFile))
		}, "has a CERTIFICATE", cow.ErrInvalid},
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

// A revocation list holds from the moment at which it is in the folder. If it cannot be read any more, nobody is let in.
func TestRevocations(t *testing.T) {
	ours, err := testpki.New("ours")
	if err != nil {
		t.Fatal(err)
	}
	dir, one, two := t.TempDir(), t.TempDir(), t.TempDir()
	list := filepath.Join(dir, crlFile)
	if err := errors.Join(ours.Server(dir), ours.Client(one), ours.Client(two)); err != nil {
		t.Fatal(err)
	}
	server, err := TLSConfig(dir)
	if err != nil {
		t.Fatal(err)
	}
	revoke := func(clients ...string) func() error {
		return func() error {
			fresh := list + ".new"
			return errors.Join(ours.Revoke(fresh, nil, clients...), os.Rename(fresh, list))
		}
	}
	for _, step := range []struct {
		name     string
		do       func() error
		one, two string // what the error says, or nothing
	}{
		{"no list", func() error { return nil }, "", ""},
		{"one is revoked", revoke(one), "was revoked", ""},
		{"two is revoked", revoke(two), "", "was revoked"},
		{"both are", revoke(one, two), "was revoked", "was revoked"},
		{"none is", revoke(), "", ""},
		{"in two lists", func() error {
			err := errors.Join(ours.Revoke(list, nil, two), ours.Revoke(list+".2", nil, one))
			more, rerr := os.ReadFile(list + ".2")
			text, terr := os.ReadFile(list)
			return errors.Join(err, rerr, terr, os.WriteFile(list, append(text, more...), 0o600))
		}, "was revoked", "was revoked"},
		{"the list is damaged", func() error { return os.Truncate(list, 100) }, "no revocation list", "no revocation list"},
		{"the list is mended", revoke(one), "was revoked", ""},
		{"the list is old", func() error {
			return ours.Revoke(list, func(l *x509.RevocationList) { l.NextUpdate = time.Now().Add(-time.Minute) }, two)
		}, "has expired", "has expired"},
		{"the list is gone", func() error { return os.Remove(list) }, "no such file", "no such file"},
	} {
		if err := step.do(); err != nil {
			t.Fatal(step.name, err)
		}
		for dir, want := range map[string]string{one: step.one, two: step.two} {
			if err := shakeHands(t, server, dir); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", step.name, err, want)
			}
		}
	}
}

// shakeHands returns the server's error of a handshake with the client whose files are in dir.
func shakeHands(t *testing.T, server *tls.Config, dir string) error {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	here, there := net.Pipe()
	defer here.Close()
	client := tls.Client(there, &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true})
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer there.Close()
		if client.Handshake() == nil {
			_, _ = client.Read(make([]byte, 1)) // the server's answer
		}
	}()
	err = tls.Server(here, server).Handshake()
	here.Close()
	<-done
	return err
}
