package owner

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
)

// The files of a server, as QEMU, libvirt and nbdkit name them.
const (
	caFile     = "ca-cert.pem"
	crlFile    = "ca-crl.pem"
	serverCert = "server-cert.pem"
	serverKey  = "server-key.pem"
)

// maxPEM bounds what is read of such a file.
const maxPEM = 1 << 20

// TLSConfig returns the TLS configuration of an NBD service, from the files in a folder. Only clients with a certificate
// of that authority are let in, which no revocation list names.
func TLSConfig(dir string) (*tls.Config, error) {
	ca, err := readPEM(filepath.Join(dir, caFile), false)
	if err != nil {
		return nil, err
	}
	authority := x509.NewCertPool()
	if !authority.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s has no certificate: %w", filepath.Join(dir, caFile), cow.ErrInvalid)
	}
	revoked, err := newRevocations(dir, ca)
	if err != nil {
		return nil, err
	}
	cert, err := readPEM(filepath.Join(dir, serverCert), false)
	if err != nil {
		return nil, err
	}
	key, err := readPEM(filepath.Join(dir, serverKey), true)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s in %s: %w", serverCert, serverKey, dir, &kindError{err, cow.ErrInvalid})
	}
	if end := pair.Leaf.NotAfter; time.Now().After(end) {
		return nil, fmt.Errorf("%s has expired on %s: %w", filepath.Join(dir, serverCert), end.Format(time.RFC3339), cow.ErrInvalid)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{pair},
		ClientCAs:    authority,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		// After the chains were verified.
		VerifyConnection: revoked.verify,
		MinVersion:       tls.VersionTLS12,
		// Each connection shows its certificate.
		SessionTicketsDisabled: true,
		// Records begin at full size: a disk's clients want throughput.
		DynamicRecordSizingDisabled: true,
	}, nil
}

// readPEM reads a small file. One that is secret must be so: it belongs to this user or to root, others have no access,
// and a group may read it only if root gave it that.
func readPEM(path string, secret bool) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // not to wait for a FIFO
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	allowed := uint32(0o700)
	if st.Uid == 0 {
		allowed |= 0o040
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, fmt.Errorf("%s is no regular file: %w", path, cow.ErrInvalid)
	case secret && st.Uid != 0 && st.Uid != uint32(os.Geteuid()):
		return nil, fmt.Errorf("the private key %s belongs to user %d: %w", path, st.Uid, cow.ErrInvalid)
	case secret && st.Mode&0o777&^allowed != 0:
		return nil, fmt.Errorf("the private key %s can be used by others (mode %04o): %w: chmod 600", path, st.Mode&0o777, cow.ErrInvalid)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err == nil && len(b) > maxPEM {
		err = fmt.Errorf("%s has more than %d bytes: %w", path, maxPEM, cow.ErrInvalid)
	}
	return b, err
}

// secured returns the TLS configuration of a service. Only on a Unix socket does the kernel know who a client is, so any
// other listener needs TLS.
func secured(network string, opts ServeOptions) (*tls.Config, error) {
	if opts.Certificates != "" {
		return TLSConfig(opts.Certificates)
	}
	if network != "unix" {
		return nil, fmt.Errorf("NBD is served over %s only with TLS, which needs certificates (--tls-certificates): %w", network, cow.ErrInvalid)
	}
	return nil, nil
}
