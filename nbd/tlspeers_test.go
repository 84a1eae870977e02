package nbd

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// serveTLS serves exports over TCP with TLS, and returns the address.
func serveTLS(t *testing.T, p pki, exports Exports) string {
	t.Helper()
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	s := New(exports, Options{TLS: p.config(t, p.server, "server")})
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		if err := <-ended; !errors.Is(err, ErrServerClosed) {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func TestLibnbdOverTLS(t *testing.T) {
	p, other := newPKI(t), newPKI(t)
	const size = 8<<20 + 512
	image := sparseImage(t, size)
	d := newRAM(size)
	addr := serveTLS(t, p, serveRAM(d))
	_, port, _ := net.SplitHostPort(addr)
	uri := func(dir string) string { return "nbds://localhost:" + port + "/disk?tls-certificates=" + dir }
	run(t, "nbdcopy", "--flush", image, uri(p.client))
	sameAsFile(t, d, image)
	back := filepath.Join(t.TempDir(), "back")
	run(t, "nbdcopy", uri(p.client), back)
	sameAsFile(t, d, back)
	if out := run(t, "nbdinfo", uri(p.client)); !strings.Contains(out, "with TLS") {
		t.Errorf("nbdinfo: %s", out)
	}
	opens := d.opens.Load()
	none := t.TempDir()
	if err := p.Trust(none); err != nil { // trusts the server, and has nothing of its own
		t.Fatal(err)
	}
	for name, uri := range map[string]string{
		"plain":               "nbd://localhost:" + port + "/disk",
		"no certificate":      uri(none),
		"another authority's": uri(other.client),
	} {
		if out, err := try(t, "nbdinfo", uri); err == nil {
			t.Errorf("%s: %s", name, out)
		}
	}
	// One that trusts the server, and has a certificate that the server does not trust.
	if err := errors.Join(other.Client(none), p.Trust(none)); err != nil {
		t.Fatal(err)
	}
	if out, err := try(t, "nbdinfo", uri(none)); err == nil {
		t.Errorf("a foreign certificate: %s", out)
	}
	if d.opens.Load() != opens {
		t.Error("the export was opened")
	}
}

func TestQemuOverTLS(t *testing.T) {
	p, other := newPKI(t), newPKI(t)
	const size = 8 << 20
	image := sparseImage(t, size)
	d := newRAM(size)
	host, port, _ := net.SplitHostPort(serveTLS(t, p, serveRAM(d)))
	creds := func(dir string) []string {
		return []string{"--object", "tls-creds-x509,id=t,endpoint=client,dir=" + dir}
	}
	disk := "driver=nbd,host=" + host + ",port=" + port + ",export=disk,tls-creds=t,tls-hostname=localhost"
	run(t, "qemu-img", append([]string{"convert", "-n", "-f", "raw"}, append(creds(p.client), "--target-image-opts", image, disk)...)...)
	sameAsFile(t, d, image)
	if out := run(t, "qemu-img", append(append([]string{"map"}, creds(p.client)...), "--image-opts", disk)...); !strings.Contains(out, "nbd") {
		t.Errorf("map: %s", out)
	}
	opens := d.opens.Load()
	if out, err := try(t, "qemu-img", append(append([]string{"info"}, creds(other.client)...), "--image-opts", disk)...); err == nil {
		t.Errorf("another authority: %s", out)
	}
	if out, err := try(t, "qemu-img", "info", "--image-opts", strings.Split(disk, ",tls-creds")[0]); err == nil || !strings.Contains(err.Error(), "TLS") {
		t.Errorf("plain: %s %v", out, err)
	}
	if d.opens.Load() != opens {
		t.Error("the export was opened")
	}
}
