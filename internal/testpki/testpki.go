// Package testpki makes certificates for tests of NBD over TLS: in files with the names that QEMU, libvirt, libnbd and
// nbdkit give them.
package testpki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Authority signs certificates.
type Authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// New makes an authority.
func New(name string) (*Authority, error) {
	t := template(name)
	t.IsCA, t.BasicConstraintsValid, t.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
	a := new(Authority)
	var err error
	a.pem, a.key, err = a.sign(t)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(a.pem)
	a.cert, err = x509.ParseCertificate(block.Bytes)
	return a, err
}

func template(name string) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62)) // rand.Reader does not fail
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
}

// sign makes a key and its certificate. An authority without a certificate signs its own.
func (a *Authority) sign(t *x509.Certificate) (cert []byte, key *ecdsa.PrivateKey, err error) {
	key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	parent, by := a.cert, a.key
	if parent == nil {
		parent, by = t, key
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, &key.PublicKey, by)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key, err
}

// Server writes the files of a server on this machine to a folder. Each of change may alter its certificate before it is
// signed.
func (a *Authority) Server(dir string, change ...func(*x509.Certificate)) error {
	t := template("server")
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	t.DNSNames, t.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	return a.write(dir, "server", t, change)
}

// Client writes the files of a client to a folder.
func (a *Authority) Client(dir string, change ...func(*x509.Certificate)) error {
	t := template("client")
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return a.write(dir, "client", t, change)
}

// Revoke writes a revocation list, which names the certificates of the clients in some folders, to a file. change, unless
// nil, may alter the list before it is signed.
func (a *Authority) Revoke(path string, change func(*x509.RevocationList), clients ...string) error {
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(24 * time.Hour)}
	for _, dir := range clients {
		text, err := os.ReadFile(filepath.Join(dir, "client-cert.pem"))
		if err != nil {
			return err
		}
		block, _ := pem.Decode(text)
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return err
		}
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: cert.SerialNumber, RevocationTime: l.ThisUpdate})
	}
	if change != nil {
		change(l)
	}
	der, err := x509.CreateRevocationList(rand.Reader, l, a.cert, a.key)
	if err != nil {
		return err
	}
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}), 0o600)
}

// Trust writes the authority's own certificate to a folder.
func (a *Authority) Trust(dir string) error {
	return errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "ca-cert.pem"), a.pem, 0o600))
}

func (a *Authority) write(dir, who string, t *x509.Certificate, change []func(*x509.Certificate)) error {
	for _, f := range change {
		f(t)
	}
	cert, key, err := a.sign(t)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(a.Trust(dir),
		os.WriteFile(filepath.Join(dir, who+"-cert.pem"), cert, 0o600),
		os.WriteFile(filepath.Join(dir, who+"-key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
}
