package owner

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/vdisk/vdisk/cow"
)

// revocations are the revocation lists in a folder of a server, which say which clients are not let in any more. The file
// is read again when it has changed, so that a new list needs no restart.
type revocations struct {
	path        string
	authorities []*x509.Certificate

	mu    sync.Mutex // guards the fields below
	stamp os.FileInfo
	lists []*x509.RevocationList
}

// newRevocations reads the lists in a folder, if there are any. ca is the content of ca-cert.pem.
func newRevocations(dir string, ca []byte) (*revocations, error) {
	r := &revocations{path: filepath.Join(dir, crlFile)}
	for rest := ca; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if c, err := x509.ParseCertificate(block.Bytes); err == nil && block.Type == "CERTIFICATE" {
			r.authorities = append(r.authorities, c)
		}
	}
	_, err := r.current()
	return r, err
}

// current returns the lists as they are now.
func (r *revocations) current() ([]*x509.RevocationList, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fi, err := os.Stat(r.path)
	if errors.Is(err, fs.ErrNotExist) && r.stamp == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err // a list that was there is not forgotten
	}
	if r.stamp == nil || !os.SameFile(fi, r.stamp) || !fi.ModTime().Equal(r.stamp.ModTime()) || fi.Size() != r.stamp.Size() {
		lists, err := r.read()
		if err != nil {
			return nil, err
		}
		r.stamp, r.lists = fi, lists
	}
	for _, l := range r.lists {
		if !l.NextUpdate.IsZero() && time.Now().After(l.NextUpdate) {
			return nil, fmt.Errorf("%s: a revocation list has expired on %s: %w", r.path, l.NextUpdate.Format(time.RFC3339), cow.ErrInvalid)
		}
	}
	return r.lists, nil
}

// read reads the file: one or more lists, each signed by a certificate in ca-cert.pem.
func (r *revocations) read() (lists []*x509.RevocationList, err error) {
	text, err := readPEM(r.path, false)
	if err != nil {
		return nil, err
	}
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "X509 CRL" {
			return nil, fmt.Errorf("%s has a %s, and revocation lists (X509 CRL) are needed: %w", r.path, block.Type, cow.ErrInvalid)
		}
		l, err := x509.ParseRevocationList(block.Bytes)
		if err == nil {
			err = r.trusted(l)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", r.path, &kindError{err, cow.ErrInvalid})
		}
		lists = append(lists, l)
	}
	if len(lists) == 0 {
		return nil, fmt.Errorf("%s has no revocation list (X509 CRL in PEM): %w", r.path, cow.ErrInvalid)
	}
	return lists, nil
}

// trusted returns an error if a list is not signed by an authority, or has something that it says must be understood: it
// may then be no whole list.
func (r *revocations) trusted(l *x509.RevocationList) error {
	for _, e := range l.Extensions {
		if e.Critical {
			return fmt.Errorf("a revocation list has the critical extension %v, which is not understood", e.Id)
		}
	}
	for i := range l.RevokedCertificateEntries {
		for _, e := range l.RevokedCertificateEntries[i].Extensions {
			if e.Critical {
				return fmt.Errorf("a revocation list has an entry with the critical extension %v, which is not understood", e.Id)
			}
		}
	}
	why := fmt.Errorf("%s has no certificate of that name", caFile)
	for _, ca := range r.authorities {
		if bytes.Equal(l.RawIssuer, ca.RawSubject) {
			if why = l.CheckSignatureFrom(ca); why == nil {
				return nil
			}
		}
	}
	return fmt.Errorf("a revocation list of %q cannot be verified: %w", l.Issuer, why)
}

// verify is the VerifyConnection of a server. It returns an error if each chain of the client's certificate has one that
// was revoked.
func (r *revocations) verify(cs tls.ConnectionState) error {
	lists, err := r.current()
	if err != nil || len(lists) == 0 {
		return err
	}
	var revoked *x509.Certificate
	for _, chain := range cs.VerifiedChains {
		bad := revokedIn(chain, lists)
		if bad == nil {
			return nil
		}
		revoked = bad
	}
	if revoked == nil {
		return errors.New("the client has no certificate")
	}
	return fmt.Errorf("the certificate of %q with the serial number %x was revoked", revoked.Subject, revoked.SerialNumber)
}

// revokedIn returns a certificate of a chain that a list of its issuer names, or nil.
func revokedIn(chain []*x509.Certificate, lists []*x509.RevocationList) *x509.Certificate {
	for i, c := range chain[:len(chain)-1] {
		for _, l := range lists {
			if !bytes.Equal(l.RawIssuer, c.RawIssuer) || l.CheckSignatureFrom(chain[i+1]) != nil {
				continue
			}
			for k := range l.RevokedCertificateEntries {
				if l.RevokedCertificateEntries[k].SerialNumber.Cmp(c.SerialNumber) == 0 {
					return c
				}
			}
		}
	}
	return nil
}
