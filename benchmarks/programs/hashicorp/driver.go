package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"

	"github.com/hashicorp/yamux"
)

const release = "release"

type command struct {
	settings
	Workload string  `json:"workload"`
	Bytes    int     `json:"bytes"`
	Openers  int     `json:"openers"`
	Count    int     `json:"count"`
	Size     int     `json:"size"`
	Warmup   int     `json:"warmup"`
	Reader   bool    `json:"reader"`
	Seconds  float64 `json:"seconds"`
	Skip     float64 `json:"skip"`
}

type answer struct {
	Seconds    float64      `json:"seconds,omitempty"`
	Operations int          `json:"operations,omitempty"`
	Bytes      int          `json:"bytes,omitempty"`
	Latencies  *percentiles `json:"latencies,omitempty"`
	RSS        int          `json:"rss,omitempty"`
	Error      string       `json:"error,omitempty"`
}

type driver struct {
	port     int
	tls      *tls.Config
	commands *json.Decoder
}

// drive returns when standard input ends.
func drive(port int, authority string) error {
	d := driver{port: port, commands: json.NewDecoder(os.Stdin)}
	if authority != "" {
		pem, err := os.ReadFile(authority)
		if err != nil {
			return err
		}
		d.tls = &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "localhost"}
		if !d.tls.RootCAs.AppendCertsFromPEM(pem) {
			return fmt.Errorf("no certificate in %s", authority)
		}
	}
	for {
		c := command{settings: settings{Window: 256 * 1024, Write: 64 * 1024}, Size: 64}
		if err := d.commands.Decode(&c); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		result, err := d.obey(&c)
		if err != nil {
			result = &answer{Error: err.Error()}
		}
		if err := say(result); err != nil {
			return err
		}
	}
}

// obey does the work of one command, on a session of its own.
func (d *driver) obey(c *command) (*answer, error) {
	if c.Workload == release {
		return &answer{}, nil // of what has failed
	}
	work, known := workloads[c.Workload]
	if !known {
		return nil, fmt.Errorf("unknown workload %q", c.Workload)
	}
	if c.AutoTune {
		return nil, errors.New("hashicorp/yamux does not tune its windows")
	}
	if c.Streams < c.Openers {
		c.Streams = c.Openers
	}
	session, err := d.connect(c.settings)
	if err != nil {
		return nil, err
	}
	defer session.Close()
	result, err := work(session, c)
	if err == nil && c.Workload == "idle" {
		return d.hold(result)
	}
	return result, err
}

func (d *driver) connect(s settings) (*yamux.Session, error) {
	conn, err := d.dial()
	if err != nil {
		return nil, err
	}
	line, err := json.Marshal(s)
	if err == nil {
		_, err = conn.Write(append(line, '\n'))
	}
	var session *yamux.Session
	if err == nil {
		session, err = yamux.Client(conn, config(s))
	}
	if err != nil {
		conn.Close()
	}
	return session, err
}

func (d *driver) dial() (net.Conn, error) {
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(d.port))
	if d.tls == nil {
		return net.Dial("tcp", address)
	}
	return tls.Dial("tcp", address, d.tls)
}

// hold answers, and keeps the session until it is released.
func (d *driver) hold(result *answer) (*answer, error) {
	if err := say(result); err != nil {
		return nil, err
	}
	var next command
	if err := d.commands.Decode(&next); err == io.EOF {
		os.Exit(0)
	} else if err != nil {
		return nil, err
	}
	if next.Workload != release {
		return nil, fmt.Errorf("want %s, not %q", release, next.Workload)
	}
	return &answer{}, nil
}
