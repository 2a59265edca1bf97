// Command goecho is a server on hashicorp/yamux, with its default configuration, that echoes each stream.
//
// It prints its port, and ends with its standard input. What the library logs is not looked at.
package main

import (
	"fmt"
	"io"
	"net"
	"os"

	"github.com/hashicorp/yamux"
)

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, "goecho:", err)
		os.Exit(1)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	go serve(listener)
	io.Copy(io.Discard, os.Stdin)
}

func serve(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go session(conn)
	}
}

func session(conn net.Conn) {
	config := yamux.DefaultConfig()
	config.LogOutput = io.Discard
	session, err := yamux.Server(conn, config)
	if err != nil {
		return
	}
	for {
		stream, err := session.AcceptStream()
		if err != nil {
			return
		}
		go func() {
			io.Copy(struct{ io.Writer }{stream}, struct{ io.Reader }{stream})
			stream.Close()
		}()
	}
}
